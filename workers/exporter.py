"""A model folder that stands on its own: adapter merged, safetensors, tokenizer, manifest."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from stillhouse.errors import ModelError
from stillhouse.storage.integrity import sha256_of
from stillhouse.workers.cache import PLAN_FOLDER, CachePlan
from stillhouse.workers.folders import atomic_folder, write_json
from stillhouse.workers.folding import fold_values
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.models.model_folder import MANIFEST
from stillhouse.workers.protocols import ExportJob

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(lm: LanguageModel, job: ExportJob) -> tuple[Path, ...]:
    """Write the model of `lm` to `job.folder`, all or nothing; return its files, sorted.

    The adapter is merged in `lm` itself, a cache plan's maps of values go into its weights, and
    these are cast: do not use `lm` afterwards. The same weights and manifest give the same bytes.
    Raises `ModelError` for an unknown dtype and for weights that are not finite after the merge or
    the cast.
    """
    if job.dtype not in DTYPES:
        raise ModelError(f"export: expected a dtype of {sorted(DTYPES)}, found {job.dtype!r}")
    model: Any = _merged(lm.model)
    plan = None if job.cache_plan is None else fold_values(model, CachePlan.load(job.cache_plan))
    model.to(dtype=DTYPES[job.dtype])
    _refuse_not_finite(model, job)
    # No hashes.json: the manifest holds the hashes.
    with atomic_folder(job.folder, seal=False) as folder:
        model.generation_config = GenerationConfig(
            bos_token_id=lm.bos, eos_token_id=list(lm.eos_ids), pad_token_id=lm.pad
        )
        model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        if plan is not None:
            plan.save(folder / PLAN_FOLDER)
        write_json(folder / MANIFEST, _manifest(job, folder))
    return tuple(sorted(path for path in job.folder.rglob("*") if path.is_file()))


def _merged(model: Any) -> PreTrainedModel:
    """Merge in the weights' own dtype; PEFT's `safe_merge` refuses a merge that is not finite."""
    if isinstance(model, PeftModel):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(
                f"export: the adapter cannot be merged: {error}; train it again"
            ) from error
    merged: PreTrainedModel = model
    return merged


def _refuse_not_finite(model: PreTrainedModel, job: ExportJob) -> None:
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"export: expected finite weights, found others in {name} as {job.dtype}; export "
                "as float32 or bfloat16, whose range is wider than float16's"
            )


def _manifest(job: ExportJob, folder: Path) -> dict[str, object]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    return {**job.manifest, "dtype": job.dtype, "files": hashes}
