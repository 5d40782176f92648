"""YAML as recipes are written: numbers as people write them, no key twice."""

import re
from typing import Any

import yaml

# YAML 1.1, which PyYAML reads, takes 1e-3 for text: it asks for a dot and a sign. 1.2 does not.
_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _RecipeLoader(yaml.SafeLoader):
    """Plain values only; refuses a mapping that holds a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below: a list cannot be a key
            if key.value in seen:
                where = key.start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", where
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"^({_FLOAT.pattern})$"), list("-+0123456789.")
)


def read_yaml(text: str) -> Any:
    """Parse one document.

    Raises yaml.YAMLError, and ValueError for a date that no calendar has or too long a number.
    """
    return yaml.load(text, _RecipeLoader)
