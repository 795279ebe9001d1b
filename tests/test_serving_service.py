"""The service: the same answers alone and in a crowd, bad photos that fail alone, and an event loop that goes on."""

import asyncio
import io
import json
import os
import shutil
import threading
import time
from concurrent.futures import CancelledError, wait
from dataclasses import asdict

import numpy as np
import pytest
import torch
from demo_files import LLAVA
from PIL import Image
from scipy.special import log_softmax
from serving_cases import BROKEN, QUESTION, jpeg, one_thread, save_tuned  # noqa: F401
from tiny_encoders import photo
from tiny_models import BREEDS

from catlib.classifiers.vlm import VLMClassifier
from catlib.errors import CatlibError, InputError
from catlib.evaluation.calibration import Calibration, store_calibration, stored_calibration
from catlib.parsing import BreedParser
from catlib.serving.service import BreedAnswer, VLMService
from catlib.serving.worker import Busy, Worker
from catlib.vlm.checkpoint import choose_precision, find_checkpoint, open_vlm
from catlib.vlm.decoding import generate_free
from catlib.vlm.models import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tuned(tmp_path_factory.mktemp("serving"))


@pytest.fixture
def service(checkpoint):
    made = VLMService(max_batch=4)
    asyncio.run(made.load_finetuned_model(checkpoint_path=checkpoint, device="cpu", precision="float32"))
    yield made
    made.close()


def direct(checkpoint, numbers, question=QUESTION, tuned=True):
    """Answers without the service, one photo at a time."""
    vlm = open_vlm(find_checkpoint(checkpoint, tuned=tuned), precision="float32")
    return [generate_free(vlm, [Image.open(io.BytesIO(jpeg(n))).convert("RGB")], question)[0] for n in numbers]


@pytest.mark.slow
def test_answers_are_the_adapter_s_and_the_same_in_a_crowd(checkpoint, service):
    expected = direct(checkpoint, range(8))
    assert len(set(expected)) > 4 and expected != direct(checkpoint, range(8), tuned=False)
    alone = [service.predict_finetuned(jpeg(n)) for n in range(8)]
    parser = BreedParser(BREEDS)
    assert alone == [BreedAnswer(text, parser.parse(text)) for text in expected]

    async def crowd():
        return await asyncio.gather(*(service.predict_finetuned_async(jpeg(n)) for n in range(8)))

    assert asyncio.run(crowd()) == alone
    assert service.predict_batch([jpeg(n) for n in range(8)]) == alone
    assert asyncio.run(service.predict_batch_async([jpeg(n) for n in range(8)])) == alone


@pytest.mark.slow
def test_the_question_is_the_checkpoints(checkpoint, service):
    own, standard = direct(checkpoint, range(6)), direct(checkpoint, range(6), Checkpoint.question)
    assert [service.predict_finetuned(jpeg(n)).answer for n in range(6)] == own != standard
    other = VLMService()
    other.load(find_checkpoint(checkpoint, question=Checkpoint.question), precision="float32")
    assert [other.predict_finetuned(jpeg(n)).answer for n in range(6)] == standard
    other.close()


@pytest.mark.slow
def test_questions_do_not_mix(checkpoint, service):
    other = "Name the breed, please."
    expected = list(zip(direct(checkpoint, range(4)), direct(checkpoint, range(4), other), strict=True))

    async def both(number):
        calls = (service.predict_finetuned_async(jpeg(number), question) for question in (QUESTION, other))
        return tuple(answer.answer for answer in await asyncio.gather(*calls))

    async def all_of_them():
        return await asyncio.gather(*map(both, range(4)))

    assert asyncio.run(all_of_them()) == expected
    assert any(a != b for a, b in expected)


@pytest.mark.slow
def test_a_bad_photo_fails_its_own_call_only(service, tmp_path):
    good = [service.predict_finetuned(jpeg(n)) for n in range(6)]
    calls = [jpeg(0), BROKEN, jpeg(1), tmp_path / "nowhere.jpg", jpeg(2), b"", jpeg(3), 7, jpeg(4), jpeg(5)]
    found = service.predict_batch(calls)
    assert [f for f in found if isinstance(f, BreedAnswer)] == good
    errors = {i: f for i, f in enumerate(found) if isinstance(f, CatlibError)}
    assert set(errors) == {1, 3, 5, 7} and all(isinstance(error, InputError) for error in errors.values())
    assert f"photo of {len(BROKEN)} bytes" in str(errors[1]) and "nowhere.jpg" in str(errors[3])
    with pytest.raises(InputError, match="photo of"):
        asyncio.run(service.predict_finetuned_async(BROKEN))


@pytest.mark.slow
def test_kinds_of_photos(service, tmp_path):
    (tmp_path / "cat.jpg").write_bytes(jpeg(4))
    picture = Image.open(tmp_path / "cat.jpg")
    answers = [
        service.predict_finetuned(p) for p in (jpeg(4), tmp_path / "cat.jpg", str(tmp_path / "cat.jpg"), picture)
    ]
    assert len(set(answers)) == 1
    assert service.predict_finetuned(photo(4).convert("RGBA")).answer  # transparency is flattened, not refused


@pytest.mark.slow
def test_load_unload_and_what_is_said_without_a_model(checkpoint):
    async def life():
        service = VLMService()
        with pytest.raises(CatlibError, match="no model is loaded"):
            await service.predict_finetuned_async(jpeg(0))
        loading = asyncio.create_task(service.load_finetuned_model(checkpoint, precision="float32"))
        ticks = 0
        while not loading.done():
            await asyncio.sleep(0.001)
            ticks += 1
        await loading
        assert ticks > 3 and service.is_loaded  # the loop went on
        calls = [asyncio.create_task(service.predict_finetuned_async(jpeg(n))) for n in range(5)]
        await asyncio.sleep(0)
        await service.unload()  # waits for the calls before it
        assert not service.is_loaded and all(isinstance(c.result(), BreedAnswer) for c in calls)
        with pytest.raises(CatlibError, match="no model is loaded"):
            service.predict_finetuned(jpeg(0))
        await service.load_finetuned_model(checkpoint, precision="float32")
        assert await service.predict_finetuned_async(jpeg(1)) == calls[1].result()
        service.close()
        with pytest.raises(CatlibError):
            await service.predict_finetuned_async(jpeg(0))

    asyncio.run(life())


@pytest.mark.slow
def test_a_wrong_checkpoint_leaves_the_model_in_place(checkpoint, service, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    for folder in (tmp_path, tmp_path / "half", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=str(folder)):
            asyncio.run(service.load_finetuned_model(folder))
    assert service.is_loaded and service.predict_finetuned(jpeg(0)).answer
    with pytest.raises(InputError, match="precision"):
        asyncio.run(service.load_finetuned_model(checkpoint, precision="int3"))


def test_a_merged_model_and_its_breeds(tmp_path):
    folder = shutil.copytree(LLAVA, tmp_path / "merged")
    (folder / "training.json").write_text(
        json.dumps({"breeds": ["Sphynx - Hairless Cat", "Manx"], "question": "Which breed?"})
    )
    service = VLMService()
    asyncio.run(service.load_finetuned_model(folder, precision="float32"))
    (answer,) = direct(folder, [1], "Which breed?")
    parser = BreedParser(["Sphynx - Hairless Cat", "Manx"])
    assert parser.parse("a Sphynx") == "Sphynx - Hairless Cat"
    assert service.predict_finetuned(jpeg(1)) == BreedAnswer(answer, parser.parse(answer))
    service.close()


def test_four_bit_where_the_weights_do_not_fit():
    seven = 7_063_000_000
    assert choose_precision(torch.bfloat16, seven, 24 * 10**9) == "bfloat16"
    assert choose_precision(torch.bfloat16, seven, 10 * 10**9) == "4-bit"
    assert choose_precision(torch.float32, seven, None) == "float32"


def test_worker_never_runs_two_calls_at_once_and_batches_what_waits():
    running, sizes, order = [], [], []

    def answer(question, photos):
        running.append(threading.get_ident())
        sizes.append(len(photos))
        order.extend(photos)
        time.sleep(0.01)
        assert len(set(running)) == 1
        return [f"{question} {p}" for p in photos]

    worker = Worker(answer, max_batch=4)
    gate = threading.Event()
    worker.run(gate.wait)
    calls = [worker.submit("q", lambda i=i: i) for i in range(10)]
    time.sleep(0.05)  # photos of the first two batches are decoded ahead
    gate.set()
    assert [call.result(5) for call in calls] == [f"q {i}" for i in range(10)]
    assert order == list(range(10)) and sizes[:2] == [4, 4] and sum(sizes) == 10
    worker.close()


def test_worker_cancelled_failed_and_refused_calls():
    def answer(question, photos):
        if "bad" in photos:
            raise RuntimeError("cannot do it")
        return list(photos)

    worker = Worker(answer, max_batch=4, max_waiting=5)
    gate = threading.Event()
    worker.run(gate.wait)
    time.sleep(0.05)  # the task has left the queue
    calls = [worker.submit("q", lambda p=p: p) for p in ("a", "bad", "b", "never", "c")]
    with pytest.raises(Busy, match="5 calls"):
        worker.submit("q", lambda: "d")
    assert calls[3].cancel()
    time.sleep(0.05)
    gate.set()
    wait(calls, 5)
    assert [calls[i].result() for i in (0, 2, 4)] == ["a", "b", "c"]
    assert isinstance(calls[1].exception(), RuntimeError) and calls[3].cancelled()
    worker.close()
    with pytest.raises(CatlibError, match="closed"):
        worker.submit("q", lambda: "d")


class Panic(BaseException):
    """As a Rust library's: no Exception."""


@pytest.mark.parametrize(
    "raised", [Panic("tokenizer"), SystemExit(1), KeyboardInterrupt(), StopIteration(), CancelledError(), MemoryError()]
)
def test_whatever_the_model_raises_every_call_ends_and_the_next_is_answered(raised):
    def answer(question, photos):
        if "bad" in photos:
            raise raised
        return list(photos)

    worker = Worker(answer, max_batch=4)
    gate = threading.Event()
    worker.run(gate.wait)

    async def crowd():
        calls = [asyncio.wrap_future(worker.submit("q", lambda p=p: p)) for p in ("a", "bad", "b", "bad", "c")]
        gate.set()
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)

    found = asyncio.run(crowd())
    assert [found[i] for i in (0, 2, 4)] == ["a", "b", "c"]
    assert all(isinstance(found[i], Exception) for i in (1, 3)) and type(raised).__name__ in repr(found[1])
    assert worker.submit("q", lambda: "d").result(5) == "d"

    def task():
        raise raised

    error = worker.run(task).exception(5)
    assert isinstance(error, Exception) and type(raised).__name__ in repr(error)
    worker.close()
    worker.close()


@pytest.mark.parametrize("answers", [[], ["one"], ["one", "two", "three"], None, 7])
def test_too_few_answers_or_too_many_are_an_error_of_each_call(answers):
    worker = Worker(lambda question, photos: answers, max_batch=2)
    gate = threading.Event()
    worker.run(gate.wait)
    calls = [worker.submit("q", lambda: "p") for _ in range(2)]
    gate.set()
    done, _ = wait(calls, 5)
    assert len(done) == 2
    if answers == ["one"]:  # asked one by one, it is right
        assert [call.result() for call in calls] == ["one", "one"]
    else:
        assert all(isinstance(call.exception(), Exception) for call in calls)
    worker.close()


def test_a_photo_that_is_never_read_fails_alone(monkeypatch):
    monkeypatch.setattr("catlib.serving.worker.READ_S", 0.2)
    never = threading.Event()
    worker = Worker(lambda question, photos: list(photos), max_batch=4)
    calls = [worker.submit("q", lambda: "a"), worker.submit("q", never.wait), worker.submit("q", lambda: "b")]

    def panic():
        raise Panic("decoder")

    calls.append(worker.submit("q", panic))
    done, _ = wait(calls, 5)
    assert len(done) == 4 and calls[0].result() == "a" and calls[2].result() == "b"
    assert isinstance(calls[1].exception(), InputError) and "Panic" in str(calls[3].exception())
    never.set()
    worker.close()


@pytest.mark.slow
def test_hostile_photos_are_refused_and_the_service_goes_on(service, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "pipe.jpg")
    (tmp_path / "cut.jpg").write_bytes(jpeg(0)[:-100])
    half = Image.open(tmp_path / "cut.jpg")  # not decoded yet
    hostile = [
        tmp_path / "pipe.jpg",
        tmp_path / "link.jpg",
        tmp_path,
        "/dev/zero",
        "a\0b",
        "~nobody-here/x.jpg",
        "",
        half,
    ]
    hostile += [
        Image.new("RGB", (0, 5)),
        Image.new("L", (9000, 2)),
        None,
        3.5,
        bytearray(b"%!PS-Adobe-3.0 EPSF-3.0\n{} loop"),
    ]
    found = service.predict_batch([jpeg(1), *hostile, jpeg(2)])
    assert isinstance(found[0], BreedAnswer) and isinstance(found[-1], BreedAnswer)
    assert all(isinstance(error, InputError) for error in found[1:-1])
    (tmp_path / "whole.jpg").write_bytes(jpeg(1))
    assert (
        service.predict_finetuned(memoryview(jpeg(1))) == found[0] == service.predict_finetuned(tmp_path / "whole.jpg")
    )


@pytest.mark.slow
def test_a_load_that_fails_late_keeps_the_model(checkpoint, service, monkeypatch, tmp_path):
    before = service.predict_finetuned(jpeg(0))
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = bytearray((other / "adapter_model.safetensors").read_bytes())
    weights[-5] ^= 1  # a flipped bit: found when the model is opened
    (other / "adapter_model.safetensors").write_bytes(weights)
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr("catlib.vlm.models.pick_device", lambda name: torch.device("cpu"))
        with pytest.raises(InputError):
            asyncio.run(service.load_finetuned_model(other, device="cpu", precision="float32"))
        assert service.predict_finetuned(jpeg(0)) == before
    monkeypatch.undo()

    def panic(*_, **__):
        raise Panic("tokenizer")

    monkeypatch.setattr("catlib.serving.service.open_vlm", panic)
    with pytest.raises(CatlibError, match="Panic"):
        asyncio.run(service.load_finetuned_model(checkpoint))
    assert service.predict_finetuned(jpeg(0)) == before
    monkeypatch.undo()
    service.load(checkpoint, "cpu", "float32")
    assert service.predict_finetuned(jpeg(0)) == before


@pytest.mark.slow
def test_busy_loses_no_answer_of_a_batch(checkpoint):
    service = VLMService(max_batch=2, max_waiting=4)
    service.load(checkpoint, "cpu", "float32")
    gate = threading.Event()
    held = service.with_model(lambda classifier: gate.wait())
    waiting = [service._worker.submit("", lambda: None) for _ in range(2)]  # others' calls fill half of the queue
    time.sleep(0.1)
    threading.Timer(0.3, gate.set).start()
    found = service.predict_batch([jpeg(n) for n in range(4)])
    assert [type(f) for f in found] == [BreedAnswer, BreedAnswer, Busy, Busy] and held.result(5)
    assert asyncio.run(service.predict_batch_async([jpeg(n) for n in range(2)])) == found[:2]
    assert all(call.exception(5) for call in waiting)  # None is no photo
    with service:
        pass
    service.close()


@pytest.mark.long
@pytest.mark.slow
def test_three_ways_to_read_a_model(checkpoint, tmp_path):
    vlm = open_vlm(find_checkpoint(checkpoint), precision="float32")
    for decoding in ("score", "constrained", "free"):
        with VLMService(decoding=decoding, reasons=True) as service:
            service.load(checkpoint, precision="float32")
            found = [service.predict_finetuned(jpeg(n)) for n in range(6)]
            other = service.predict_finetuned(jpeg(0), "Another question?")
        images = [Image.open(io.BytesIO(jpeg(n))).convert("RGB") for n in range(6)]
        expected = VLMClassifier(vlm, decoding=decoding).classify(images)
        assert [f.breed for f in found] == list(expected.predicted) and isinstance(other, BreedAnswer)
        assert [f.answer for f in found] == [generate_free(vlm, [image], QUESTION)[0] for image in images]
        if decoding == "score":
            for answer, row in zip(found, expected.log_probs, strict=True):
                assert next(iter(answer.probabilities)) == answer.breed and set(answer.probabilities) == set(BREEDS)
                assert answer.probabilities[answer.breed] == pytest.approx(np.exp(row.max()), rel=1e-4)
                assert answer.sure is None  # nothing was fitted
            json.dumps([asdict(answer) for answer in found])
        else:
            assert all(f.probabilities is None and f.sure is None for f in found)
    with pytest.raises(InputError, match="decoding"):
        VLMService(decoding="loud")


@pytest.mark.slow
def test_probabilities_are_calibrated_by_what_lies_beside_the_weights(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "tuned")
    way = {"breeds": list(BREEDS), "question": QUESTION, "score_norm": "mean", "prior_strength": 0.5}
    store_calibration(folder, Calibration(2.0, 0.4, 0.95, 30, way))
    vlm = open_vlm(find_checkpoint(folder), precision="float32")
    image = Image.open(io.BytesIO(jpeg(1))).convert("RGB")
    scores = VLMClassifier(vlm, None, "score", "mean", 0.5).classify([image]).log_probs

    def asked(**options):
        with VLMService(decoding="score", **options) as service:
            service.load(folder, precision="float32")
            return service.predict_finetuned(jpeg(1))

    answer, expected = asked(), np.exp(log_softmax(scores / 2, axis=1)).max()
    assert answer.probabilities[answer.breed] == pytest.approx(expected, rel=1e-4)
    assert answer.sure is bool(expected >= 0.4) and sum(answer.probabilities.values()) == pytest.approx(1)
    store_calibration(folder, Calibration(2.0, None, 0.95, 30, way))
    assert asked().sure is False  # no confidence was enough on the validation photos
    store_calibration(folder, Calibration(2.0, 0.4, 0.95, 30, {**way, "question": "Another?"}))
    assert asked().sure is None
    store_calibration(folder, Calibration(2.0, 0.4, 0.95, 30, way))
    (folder / "adapter_model.safetensors.sha256").write_text("0" * 64 + "\n")  # trained anew since
    assert stored_calibration(folder) is None
    for wrong in ({"temperature": 0}, {"temperature": "2"}, {"threshold": -1}, {"way": []}, {"photos": None}):
        record = json.loads((folder / "calibration.json").read_text()) | {"weights": "0" * 64} | wrong
        (folder / "calibration.json").write_text(json.dumps(record))
        with pytest.raises(InputError, match="calibration.json"):
            stored_calibration(folder)
        store_calibration(folder, Calibration(2.0, 0.4, 0.95, 30, way))
