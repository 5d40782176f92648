"""A safetensors folder for every model reference; what must be converted is converted once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.workers.models import toy
from stillhouse.workers.models.cache_folder import (
    build_once,
    default_cache_root,
    join_pieces,
    require_space,
)
from stillhouse.workers.models.gguf_header import GgufHeader, check_whole, read_header
from stillhouse.workers.models.model_folder import (
    check_model_folder,
    missing_weights,
    refuse_missing_weights,
)
from stillhouse.workers.models.packages import SourceFile
from stillhouse.workers.models.refs import (
    ModelRef,
    fingerprint,
    hub_commit,
    hub_folder,
    locate,
    parse,
)
from stillhouse.workers.models.tokenizer import restore_bos, wants_bos

_DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def silent(message: str) -> None:
    """Tell nobody."""


@dataclass(frozen=True, slots=True)
class ModelStore:
    """Model folders under `cache_root`; `notify` hears of work that takes longer than a moment."""

    cache_root: Path = field(default_factory=default_cache_root)
    notify: Callable[[str], None] = silent

    def fingerprint(self, ref: str) -> str:
        """A hash of a model's files, without loading them."""
        return fingerprint(ref, self.cache_root)

    def folder(self, ref: str) -> Path:
        """The safetensors folder of a model; raises ModelError when there can be none."""
        parsed = parse(ref)
        if parsed.scheme == "toy":
            return self._made(ref, lambda partial: self._train_toy(parsed.body, partial))
        if parsed.scheme in {"gguf", "package"}:
            return self._converted(ref)
        if parsed.scheme == "peft":
            raise ModelError(f"{ref}: expected a whole model, found an adapter; name its base here")
        folder = self._snapshot(parsed) if parsed.scheme == "hf" else _local(parsed)
        check_model_folder(folder, ref)
        return folder

    def tokenizer_folder(self, ref: str) -> Path:
        """A folder to load the tokenizer from, without converting any weights."""
        parsed = parse(ref)
        if parsed.scheme not in {"gguf", "package"}:
            return self.folder(ref)
        made = self.fingerprint(ref)
        converted = self.cache_root / "models" / made
        if converted.is_dir():
            return converted
        target = self.cache_root / "tokenizers" / made
        (file,) = locate(ref)
        return build_once(
            target, lambda partial: _write_tokenizer(file, partial), self._waits(parsed.name)
        )

    def _made(self, ref: str, build: Callable[[Path], None]) -> Path:
        target = self.cache_root / "models" / self.fingerprint(ref)
        return build_once(target, build, self._waits(parse(ref).name))

    def _waits(self, name: str) -> Callable[[], None]:
        return lambda: self.notify(f"{name}: another process is preparing it; waiting")

    def _train_toy(self, name: str, partial: Path) -> None:
        from stillhouse.workers.models.toy_training import train_toy

        self.notify(f"toy:{name}: training a small model, some seconds, once")
        model = toy.spec(name)
        train_toy(model, self.tokenizer_folder(model.tokenizer), partial)

    def _snapshot(self, parsed: ModelRef) -> Path:
        folder = hub_folder(parsed)
        if (folder / "config.json").is_file() and missing_weights(folder) is None:
            return folder
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        self.notify(f"{parsed.body}: downloading")
        try:
            snapshot_download(parsed.body, revision=hub_commit(parsed), allow_patterns=_DOWNLOADED)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"hf:{parsed.body}: not in the hub cache ({folder}), and it could not be "
                f"downloaded: {error}. Check the name, the network, and HF_TOKEN for gated models"
            ) from error
        return folder

    def _converted(self, ref: str) -> Path:
        (file,) = locate(ref)
        if not file.name.endswith(".gguf"):
            raise ModelError(f"{ref}: expected a .gguf file, found {file.name!r}")
        # Where the file comes in parts, the header lies in the first.
        header = read_header(file.pieces[0])
        check_whole(ref, header, file.size)

        def convert(partial: Path) -> None:
            size = 4 * header.parameters
            require_space(self.cache_root, size + file.size, f"{file.name}, dequantised,")
            self.notify(
                f"{file.name}: dequantising {header.parameters / 1e6:.0f}M parameters, once; "
                f"takes about a minute and {size / 1e9:.1f} GB"
            )
            _dequantise(file, header, partial)

        return self._made(ref, convert)


def _local(parsed: ModelRef) -> Path:
    folder = Path(parsed.body).expanduser()
    if not folder.is_dir():
        locate(parsed.body)  # says what was expected
    return folder


def _dequantise(file: SourceFile, header: GgufHeader, target: Path) -> None:
    """Write `file` as an fp32 safetensors folder.

    fp32, not bf16: a block's scale times an integer has more than bf16's 8 significant bits, so a
    bf16 copy would be another model than the file; fp32 is exact and loads by mapping.
    """
    import torch
    from transformers import AutoModelForCausalLM

    path = _assembled(file, target)
    made: Any = AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=torch.float32,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, found = made
    refuse_missing_weights(found, file.name)
    # transformers 5 keeps the quantizer of a dequantised model and then refuses to save it.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(target))
    _save_tokenizer(path, header, str(model.config.model_type), target)
    _drop_assembled(path, target)


def _write_tokenizer(file: SourceFile, target: Path) -> None:
    header = read_header(file.pieces[0])
    path = _assembled(file, target)
    architecture = str(header.metadata.get("general.architecture"))
    _save_tokenizer(path, header, architecture, target)
    _drop_assembled(path, target)


def _save_tokenizer(path: Path, header: GgufHeader, model_type: str, target: Path) -> None:
    from transformers import AutoTokenizer, GemmaTokenizer

    # AutoTokenizer reads the whole file once more to learn its class: 14 s for Gemma, 2 s without.
    kind: Any = GemmaTokenizer if model_type.startswith("gemma") else AutoTokenizer
    tokenizer = kind.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
    # llama.cpp: a SentencePiece tokenizer begins with BOS unless the file says otherwise
    sentencepiece = header.metadata.get("tokenizer.ggml.model") == "llama"
    if header.metadata.get("tokenizer.ggml.add_bos_token", sentencepiece or wants_bos(model_type)):
        restore_bos(tokenizer)
    tokenizer.save_pretrained(str(target))


def _assembled(file: SourceFile, target: Path) -> Path:
    if len(file.pieces) == 1:
        return file.pieces[0]
    path = target / "assembled" / file.name
    path.parent.mkdir()
    join_pieces(file.pieces, path)
    return path


def _drop_assembled(path: Path, target: Path) -> None:
    if path.is_relative_to(target):
        path.unlink()
        path.parent.rmdir()
