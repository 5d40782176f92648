"""The chains of stages that recipes name."""

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.stage import Stage
from stillhouse.pipelines.stages.compress import CompressStage
from stillhouse.pipelines.stages.curate import CurateStage
from stillhouse.pipelines.stages.deploy import DeployStage
from stillhouse.pipelines.stages.distill import DistillStage
from stillhouse.pipelines.stages.evaluate import EvaluateStage
from stillhouse.pipelines.stages.expand import ExpandStage
from stillhouse.pipelines.stages.ingest import IngestStage
from stillhouse.pipelines.stages.score import ScoreStage
from stillhouse.pipelines.stages.select import SelectStage
from stillhouse.pipelines.stages.specialize import SpecializeStage


def chain(recipe: RecipeConfig) -> tuple[Stage, ...]:
    """Return the stages of a recipe, in order."""
    stages: tuple[Stage, ...] = (
        IngestStage(),
        SpecializeStage(),
        ScoreStage(),
        SelectStage(),
        ExpandStage(),
        CurateStage(),
        DistillStage(),
        EvaluateStage(),
        CompressStage(),
        DeployStage(),
    )
    trained_here = recipe.models.adapter == "stage:specialize"
    return tuple(stage for stage in stages if trained_here or stage.name != "specialize")
