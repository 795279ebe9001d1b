"""Photos of none of the breeds and changed photos: AUROC, its interval, and the falls that a table tells."""

import numpy as np
import pytest
from evaluation_cases import BREEDS, RARE, scored_set, truth
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from catlib.classifiers.further import CHANGES, further_sets
from catlib.classifiers.tracks import UNKNOWN
from catlib.data.records import make_sample, write_samples
from catlib.errors import InputError
from catlib.evaluation.results import Results
from catlib.evaluation.tables import confidence_table
from catlib.evaluation.unknown import auroc
from catlib.settings import ComparisonSettings


def test_auroc_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    for n, m, levels in ((5, 3, 3), (40, 7, 1000), (200, 300, 12)):
        high, low = rng.integers(levels, size=n) + 1.0, rng.integers(levels, size=m).astype(float)
        expected = roc_auc_score(np.repeat([1, 0], [n, m]), np.concatenate([high, low]))
        found = auroc(high, low, np.arange(n), np.arange(m))
        assert found["value"] == pytest.approx(expected) and found["ci95"][0] < expected <= found["ci95"][1]
    perfect = auroc(np.ones(6), np.zeros(4), np.arange(6), np.arange(4))
    assert perfect["value"] == 1 and 0.3 < perfect["ci95"][0] < 0.8  # four photos are little evidence


@pytest.mark.parametrize(("copies", "least", "most"), [(1, 0.91, 0.99), (3, 0.90, 0.99)])
def test_the_interval_holds_the_truth(copies, least, most):
    """300 drawn sets, each photo once or as three photos of one cat: 95 % of the intervals hold the true area."""
    rng, truth, held = np.random.default_rng(1), norm.cdf(1 / np.sqrt(2)), 0
    for _ in range(300):
        high, low = rng.normal(1.0, size=40).repeat(copies), rng.normal(size=30).repeat(copies)
        ends = auroc(high, low, np.arange(40).repeat(copies), np.arange(30).repeat(copies))["ci95"]
        held += ends[0] <= truth <= ends[1]
    assert least < held / 300 < most


def test_results_tell_what_is_unknown_and_what_a_change_costs():
    true = truth(30)
    sure, unsure = (scored_set(n, true, 0.95, seed=i) for i, n in enumerate(("vlm-tuned", "clip-zero-shot")))
    rng = np.random.default_rng(0)
    flat = scored_set("vlm-tuned", ["Sokoke"] * 40, 0.5, breeds=(*BREEDS, "Sokoke"), prefix="other")
    scores = np.log(rng.dirichlet(np.full(len(BREEDS), 20.0), size=40))
    rows = tuple(
        type(p)(p.id, p.image, "Sokoke", BREEDS[s.argmax()], tuple(s))
        for p, s in zip(flat.predictions, scores, strict=True)
    )
    unknown = type(flat)("vlm-tuned", rows, sure.meta)
    blurred = scored_set("vlm-tuned", true, 0.5, seed=7)
    further = {UNKNOWN: {"vlm-tuned": unknown}, "blur": {"vlm-tuned": blurred}}
    results = Results({"vlm-tuned": sure, "clip-zero-shot": unsure}, {}, RARE, bootstrap=200, further=further)
    found = results.models["vlm-tuned"]["further"]
    assert found[UNKNOWN]["max_probability"]["value"] > 0.99 and found[UNKNOWN]["energy"] is None
    fall = found["blur"]["gain_points"]
    assert fall["ci95"][0] < fall["value"] < fall["ci95"][1] < -25 and found["blur"]["n"] == 300
    assert results.models["clip-zero-shot"]["further"] == {}
    table = confidence_table(results.models)
    assert table.loc["VLM, tuned", "blur"].startswith("-4") and table.loc["CLIP, zero-shot", "blur"] == "-"
    assert table.loc["VLM, tuned", "unknown, by probability"].startswith(("99.", "100.0"))
    assert set(results.only(["vlm-tuned"]).models["vlm-tuned"]["further"]) == {UNKNOWN, "blur"}
    plain = confidence_table(Results({"vlm-tuned": sure}, {"vlm-tuned": blurred}, RARE, bootstrap=200).models)
    assert (
        list(plain) == ["Brier", "ECE", "ECE, calibrated", "area, risk-coverage"]
        and "[" in plain["ECE, calibrated"].iloc[0]
    )


def test_further_sets_are_checked_and_changed(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(255, size=(90, 120, 3), dtype=np.uint8))
    (tmp_path / "others/dogs").mkdir(parents=True)
    photo.save(tmp_path / "others/dogs/a.jpg")
    test = [make_sample(f"{b}-{i}", "a.jpg", "Which?", b, breed=b, group=f"{b}{i}") for b in BREEDS for i in range(70)]
    settings = ComparisonSettings(unknown_data=str(tmp_path / "others"), robustness=",".join(CHANGES))
    sets = further_sets(settings, test, tmp_path, BREEDS)
    assert [s.name for s in sets] == [*CHANGES, UNKNOWN] and [s.image for s in sets[-1].samples] == ["dogs/a.jpg"]
    assert {len(s.samples) for s in sets[:-1]} == {500} and sets[-1].image_root == tmp_path / "others"
    for name, change in CHANGES.items():
        changed = change(photo)
        assert changed.mode == "RGB" and (changed.size != photo.size or changed.tobytes() != photo.tobytes()), name
    assert max(CHANGES["small"](photo).size) == 64 and CHANGES["crop"](photo).size == (72, 54)
    write_samples(tmp_path / "vlm/known.jsonl", test[:1])
    photo.save(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    for wrong, said in (
        ({"unknown_data": str(tmp_path / "vlm/known.jsonl")}, f"photos of {BREEDS[0]}, which the models know"),
        ({"unknown_data": str(tmp_path / "empty")}, "no photos"),
        ({"robustness": "fog"}, "expected some of blur"),
        ({"unknown_data": str(tmp_path / "nothing.jsonl")}, "nothing.jsonl"),
    ):
        with pytest.raises(InputError, match=said):
            further_sets(ComparisonSettings(**wrong), test, tmp_path, BREEDS)
