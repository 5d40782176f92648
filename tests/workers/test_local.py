import gc
import weakref

import pytest
import torch

from stillhouse.configs.stages import CompressConfig, LoraConfig, TrainConfig
from stillhouse.workers.local import LocalWorkers
from stillhouse.workers.protocols import (
    CacheSpec,
    CalibrateJob,
    Completion,
    Decoding,
    ExportJob,
    ModelSpec,
    Pair,
    TrainExample,
    TrainJob,
)

HOW = Decoding(max_new_tokens=6)
PROMPTS = ["Q 1:", "a longer prompt"]
PAIRS = [Pair("Q 1:", " A1"), Pair("Q 2:", " A2")]


@pytest.fixture
def workers(tmp_path):
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield LocalWorkers(tmp_path / "cache", threads=1)
    torch.use_deterministic_algorithms(deterministic)


def loaded(workers):
    return workers._models._loaded


def test_the_whole_line_on_one_model(workers, model_folders, tmp_path):
    base = ModelSpec(str(model_folders["gemma"]))
    examples = [TrainExample(f"e{i}", f"Q {i}:", f" A{i % 3}") for i in range(8)]
    config = TrainConfig(lora=LoraConfig(rank=4), epochs=4, batch_size=4, learning_rate=1e-2)
    outcome = workers.train(TrainJob(base, examples, config, tmp_path / "t"), lambda *step: None)
    assert not loaded(workers)
    student = ModelSpec(base.ref, outcome.adapter)
    answers = workers.model(student).answer(PROMPTS, HOW)
    measures, _ = workers.measure_cache(student, ["Q 1: A1"], CacheSpec(CompressConfig()))
    assert measures[0].kl_mean >= 0
    compressed = workers.model(student).answer(PROMPTS, HOW, CacheSpec(CompressConfig(key_bits=8)))
    assert all(isinstance(one, Completion) for one in compressed)
    texts = [example.prompt + example.response for example in examples]
    job = CalibrateJob(student, texts, CompressConfig(sinks=1), tmp_path / "plan")
    assert workers.calibrate(job) > 0
    fitted = CacheSpec(job.config, job.folder)
    assert len(workers.model(student).logp([Pair("Q 1:", " A1")], 1, fitted)) == 1
    workers.export(ExportJob(student, tmp_path / "out", "float32", {}))
    assert not loaded(workers)
    assert workers.model(ModelSpec(str(tmp_path / "out"))).answer(PROMPTS, HOW) == answers


def test_an_adapter_and_its_base_are_one_model(workers, model_folders, tmp_path):
    base = ModelSpec(str(model_folders["llama"]))
    examples = [TrainExample("e", "Q 1:", " A1")]
    config = TrainConfig(lora=LoraConfig(rank=2), learning_rate=0.1)
    outcome = workers.train(TrainJob(base, examples, config, tmp_path / "t"), lambda *step: None)
    specialist = ModelSpec(base.ref, outcome.adapter)
    pair = workers.pair(specialist, base)
    scored = pair.score(PAIRS, 2)
    proposed, answered = pair.propose(PROMPTS, HOW), pair.answer(PROMPTS, HOW)
    assert list(loaded(workers)) == [specialist]
    alone = workers.model(base)
    assert proposed == alone.answer(PROMPTS, HOW)
    assert [one.logp_base for one in scored] == [one.logp for one in alone.logp(PAIRS, 2)]
    assert answered == workers.model(specialist).answer(PROMPTS, HOW)
    assert sum(scored[0].logp_specialist) > sum(scored[0].logp_base)


def test_two_whole_models_stay_together_and_a_third_frees_them(workers, model_folders, tmp_path):
    one, two = (ModelSpec(str(model_folders[kind])) for kind in ("llama", "gemma"))
    workers.pair(one, two).propose(PROMPTS, HOW)
    assert set(loaded(workers)) == {one, two}
    first = weakref.ref(loaded(workers)[one].model)
    workers.model(two).answer(PROMPTS, HOW)
    gc.collect()
    assert first() is None
    assert list(loaded(workers)) == [two]


def test_tokens_are_counted_as_prompts_are_encoded(workers, model_folders, lm):
    texts = ["abc", "", "<bos>x", "ä"]
    ref = str(model_folders[lm.name])
    assert workers.count_tokens(ref, texts) == [len(lm.encode_prompt(text)) for text in texts]
    assert workers.count_tokens(ref, []) == []
    assert not loaded(workers)


def test_a_finished_training_loads_no_model(workers, model_folders, tmp_path, monkeypatch):
    examples = [TrainExample("e", "Q 1:", " A1")]
    job = TrainJob(
        ModelSpec(str(model_folders["llama"])), examples, TrainConfig(epochs=1), tmp_path / "t"
    )
    outcome = workers.train(job, lambda *step: None)
    monkeypatch.setattr(workers._models, "get", lambda *specs: pytest.fail("loaded a model"))
    assert workers.train(job, lambda *step: None) == outcome


def test_threads_are_set_once_on_first_use(workers, model_folders):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        workers.model(ModelSpec(str(model_folders["llama"]))).answer([], HOW)
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        workers.model(ModelSpec(str(model_folders["gemma"]))).answer([], HOW)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_fingerprint_is_of_the_files(workers, model_folders):
    first, second = (workers.fingerprint(str(model_folders[kind])) for kind in ("llama", "gemma"))
    assert first != second
    assert not loaded(workers)
