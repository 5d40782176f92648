"""Parts of countries (ISO 3166-2): the name of a province, county or state; its country.

Names that are in several countries, or that hold their country's own name, are left out. Splits
are those of `labelled`.
"""

from collections.abc import Iterator

from stillhouse.workers.sources.labelled import LabelledConfig, Row, Texts, divide

CONFIG = LabelledConfig


def build(split: str, config: LabelledConfig) -> Iterator[Row]:
    """Yield the rows of one split."""
    return divide("region", _regions(), None, config).rows(split)


def _regions() -> Texts:
    import pycountry

    countries = {country.alpha_2: country.name for country in pycountry.countries}
    where: dict[str, set[str]] = {}
    for part in pycountry.subdivisions:
        where.setdefault(" ".join(part.name.split()), set()).add(countries[part.country_code])
    regions: dict[str, list[str]] = {}
    for name, found in sorted(where.items()):
        [country, *others] = sorted(found)
        if not others and country.lower() not in name.lower() and "," not in country:
            regions.setdefault(country, []).append(name)
    return dict(sorted(regions.items()))
