"""A whole run, as written in a recipe."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from stillhouse.configs.base import Config, knob
from stillhouse.configs.data import DataConfig, ModelsConfig
from stillhouse.configs.expand import ExpandConfig
from stillhouse.configs.select import SelectConfig
from stillhouse.configs.stages import (
    CompressConfig,
    CurateConfig,
    DeployConfig,
    DistillConfig,
    EvaluateConfig,
    ScoreConfig,
    SpecializeConfig,
)

_TRACKING_URI = re.compile(
    r"(https?://|sqlite(\+\w+)?:////|(postgresql|mysql|mssql)(\+\w+)?://)[^/]", re.IGNORECASE
)


class TrackingConfig(Config):
    """Where MLflow is. No `uri` means a local sqlite file under `runs_root`."""

    enabled: bool = True
    uri: str | None = None
    experiment: str = "stillhouse"

    @field_validator("uri")
    @classmethod
    def _is_a_place_that_mlflow_tracks_to(cls, uri: str | None) -> str | None:
        if uri is None or _TRACKING_URI.match(uri):
            return uri
        found = uri if "@" not in uri else f"a URI that begins with {uri.partition(':')[0]}:"
        raise ValueError(
            "tracking.uri: expected http(s)://…, sqlite:///<absolute path> (so with four slashes) "
            "or a database URI (postgresql, mysql, mssql), because MLflow 3 refuses folders such "
            "as ./mlruns, and a relative sqlite path would move with the working directory; "
            f"found {found}"
        )


class ExecutionConfig(Config):
    """How the work is run; nothing here changes what is written."""

    threads: int = knob(0, ge=0)  # 0: OMP_NUM_THREADS, else all cores


class RecipeConfig(Config):
    """One run: data, models, and a section a stage."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    pipeline: Literal["transfer"] = "transfer"
    runs_root: str = "runs"
    models: ModelsConfig
    data: DataConfig
    specialize: SpecializeConfig = SpecializeConfig()
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    expand: ExpandConfig = ExpandConfig()
    curate: CurateConfig = CurateConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compress: CompressConfig = CompressConfig()
    deploy: DeployConfig = DeployConfig()
    tracking: TrackingConfig = TrackingConfig()
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="after")
    def _specialist_is_named_once(self) -> Self:
        if (self.models.adapter is None) == (self.models.specialist is None):
            raise ValueError(
                "models: expected exactly one of `adapter` (a LoRA on the base) and `specialist` "
                "(a whole model), because the gap is measured between specialist and base; "
                f"found adapter={self.models.adapter!r}, specialist={self.models.specialist!r}"
            )
        return self

    @model_validator(mode="after")
    def _private_data_has_a_reader(self) -> Self:
        trains = self.models.adapter == "stage:specialize"
        ceiling = "ceiling" in self.evaluate.arms
        if (trains or ceiling) and self.data.private is None:
            raise ValueError(
                "data.private: `stage:specialize` and the ceiling arm train on private pairs; "
                "name their source, or give models.adapter as `peft:<folder>`"
            )
        return self

    @model_validator(mode="after")
    def _there_are_prompts(self) -> Self:
        if not self.data.pool and not self.data.seeds:
            raise ValueError(
                "data.pool, data.seeds: expected at least one source of prompts, found none"
            )
        return self

    @model_validator(mode="after")
    def _each_generator_has_work(self) -> Self:
        names = [generator.name for generator in self.expand.generators]
        count = self.expand.prompts_per_round
        if len(set(names)) != len(names):
            raise ValueError(f"expand.generators: expected different ones, found {names}")
        if count < len(names):
            raise ValueError(
                f"expand.prompts_per_round: {count} cannot be shared by {len(names)} generators"
            )
        return self

    @model_validator(mode="after")
    def _signals_are_measured(self) -> Self:
        if "target_weakness" in self.select.signals() and not self.score.target:
            raise ValueError("select: target_weakness needs score.target=true")
        asking = [str(c.signal) for c in self.select.criteria if c.controls is not None]
        asking += sorted({"controlled_gap", "likeness"} & {*self.select.signals()})
        if "likeness" in self.select.signals() and not self.data.seeds:
            raise ValueError(
                "select: likeness is likeness to the seeds; name some under data.seeds"
            )
        if asking and not self.data.controls:
            raise ValueError(
                f"select: {asking[0]} is measured against control prompts; name some that are not "
                "of the speciality under data.controls, such as "
                "builtin:elsewhere?split=pool&count=200"
            )
        return self

    @model_validator(mode="after")
    def _each_arm_answers_once(self) -> Self:
        arms = self.evaluate.arms
        if len(set(arms)) != len(arms):
            raise ValueError(f"evaluate.arms: expected different arms, found {list(arms)}")
        return self

    @model_validator(mode="after")
    def _student_is_evaluated(self) -> Self:
        if "student" not in self.evaluate.arms:
            raise ValueError(
                "evaluate.arms: `student` is needed, because the gate judges it and `deploy` "
                f"compares the exported copy with its answers; found {list(self.evaluate.arms)}"
            )
        return self

    @model_validator(mode="after")
    def _a_server_has_the_cache(self) -> Self:
        cache = self.compress
        scalars = (cache.key_scalar, cache.value_scalar, cache.seed)
        served = cache.has_served_form if cache.calibrate else cache.is_served_unfitted
        if self.deploy.engine == "vllm" and not served:
            raise ValueError(
                "deploy.engine: vllm serves a calibrated cache, or 1 to 5 bits with the scalars "
                "and the seed that are the default, and no recent tokens; found "
                f"calibrate={cache.calibrate}, bits {cache.key_bits} and {cache.value_bits}, "
                f"scalars and seed {scalars}, recent={cache.recent}"
            )
        return self

    @model_validator(mode="after")
    def _recovery_has_its_arms(self) -> Self:
        arms = set(self.evaluate.arms)
        needed = {"specialist", "target_before"}
        if self.evaluate.gate.min_recovery is not None and not needed <= arms:
            raise ValueError(
                "evaluate.gate.min_recovery: recovery = (student - target_before) / (specialist "
                f"- target_before) needs these arms too: {sorted(needed - arms)}"
            )
        return self
