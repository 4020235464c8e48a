"""Claims tested on answers whose outcome is known beforehand."""

import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest

from studies.studies import make_study
from tinyllava.errors import UnknownNameError
from tinyllava.evaluation.benchmark import Prediction
from tinyllava.studies.paper import CLAIMS
from tinyllava.studies.published import other_scores, published_scores
from tinyllava.studies.report.analysis import judge_claims
from tinyllava.studies.study import BenchmarkScores, Claim, Study, StudyCell, pack_predictions


def answers(right: range, num: int = 40) -> list[Prediction]:
    """Answers of which these are right, two questions an image; the first half is of one kind."""
    return [
        Prediction(
            benchmark="gqa",
            question_id=str(i),
            image=f"{i // 2}.jpg",
            prompt="q",
            answer="",
            parsed="",
            score=float(i in right),
            groups=(f"kind={'shape' if i < num // 2 else 'colour'}",),
        )
        for i in range(num)
    ]


def study_of(**right: range) -> tuple[Study, dict[str, BenchmarkScores]]:
    """Cells ``recipe_seed``, with their right answers; one claim, that share beats base."""
    cells = tuple(
        StudyCell(
            id=name,
            panel="all",
            label=name.partition("_")[0],
            seed=int(name[-1]),
            status="done",
            labels={"recipe": name.partition("_")[0], "language_model": "TinyLlama"},
        )
        for name in right
    )
    study = Study(
        name="own",
        title="",
        axes={"recipe": ("base", "share"), "language_model": ("TinyLlama",)},
        panels=("all",),
        cells=cells,
        claims=(Claim(text="", source="", better={"recipe": "share"}, worse={"recipe": "base"}),),
    )
    return study, {"gqa": pack_predictions({name: answers(them) for name, them in right.items()})}


def test_a_difference_over_two_seeds() -> None:
    study, scores = study_of(base_0=range(10), share_0=range(30), base_1=range(10, 30), share_1=range(36))
    (verdict,) = judge_claims(study, scores)
    assert (verdict.benchmark, verdict.metric, verdict.seeds) == ("gqa", "accuracy", (0, 1))
    # seed 0: 25 -> 75; seed 1: 50 -> 90; the means 37.5 and 82.5
    assert (verdict.worse, verdict.better) == (37.5, 82.5)
    assert verdict.difference is not None
    assert verdict.difference.difference == 45
    assert [one.bootstrap.difference for one in verdict.by_seed] == [50, 40]
    # seed 0: 20 questions that only share got right, none that only base did: 2 / 2^20
    assert (verdict.by_seed[0].only_a, verdict.by_seed[0].only_b) == (0, 20)
    assert verdict.by_seed[0].mcnemar_p == pytest.approx(2**-19)
    assert verdict.outcome == "holds"


def test_the_other_way_round_and_not_decided() -> None:
    study, scores = study_of(base_0=range(30), share_0=range(10))
    assert judge_claims(study, scores)[0].outcome == "reversed"
    study, scores = study_of(base_0=range(20), share_0=range(1, 22))
    assert judge_claims(study, scores)[0].outcome == "open"


def test_seeds_that_disagree_decide_nothing() -> None:
    # over both seeds the interval is above zero, but the second seed points the other way
    study, scores = study_of(base_0=range(1), share_0=range(40), base_1=range(22), share_1=range(20))
    (verdict,) = judge_claims(study, scores)
    assert verdict.difference is not None
    assert verdict.difference.interval[0] > 0
    assert verdict.outcome == "open"


def test_a_kind_of_question_is_tested_on_its_questions_alone() -> None:
    study, scores = study_of(base_0=range(20, 30), share_0=range(20, 40))
    claim = replace(study.claims[0], benchmark="gqa", metric="kind=colour")
    (verdict,) = judge_claims(replace(study, claims=(claim,)), scores)
    assert (verdict.worse, verdict.better) == (50, 100)
    assert verdict.by_seed[0].num_units == 20
    shape = replace(claim, metric="kind=shape")
    assert judge_claims(replace(study, claims=(shape,)), scores)[0].outcome == "open"


def test_what_was_not_measured_stays_in_sight() -> None:
    study, _ = study_of(base_0=range(1), share_0=range(2))
    claim = Claim(text="", source="", benchmark="pope", better={"recipe": "share"}, worse={"recipe": "base"})
    other = Claim(text="", source="", better={"data": "ShareGPT4V"}, worse={"data": "LLaVA-1.5"})
    verdicts = judge_claims(replace(study, claims=(claim, other)), {})
    assert [verdict.outcome for verdict in verdicts] == ["not measured", "not measured"]


def test_contexts_are_judged_apart() -> None:
    study, answers_by = make_study()
    scores = {name: pack_predictions(by_cell) for name, by_cell in answers_by.items()}
    verdicts = judge_claims(study, scores)
    first = [one for one in verdicts if one.claim is study.claims[0] and one.benchmark == "gqa"]
    assert [one.context for one in first] == [{"language_model": "TinyLlama"}, {"language_model": "Phi-2"}]
    assert [one.seeds for one in first] == [(0,), (0, 1)]  # a seed of TinyLlama with share failed


def test_the_papers_difference_stands_beside() -> None:
    study, scores = study_of(base_0=range(10), share_0=range(30))
    names = {"base": "base-C-TL", "share": "share-C-TL"}
    cells = tuple(replace(cell, published=names[cell.label]) for cell in study.cells)
    verdicts = {one.benchmark: one for one in judge_claims(replace(study, cells=cells), scores)}
    assert verdicts["gqa"].published == pytest.approx(59.4 - 58.1)
    assert verdicts["textvqa"].published == pytest.approx(48.1 - 45.8)
    assert verdicts["textvqa"].outcome == "not measured"


def test_the_papers_own_numbers_bear_out_what_it_says_of_llms_on_pope_and_sqa() -> None:
    """The claims that speak of one benchmark and of variants in Table A1 have the sign of its numbers."""
    variants = {"TinyLlama": "TL", "StableLM-2": "SLM", "Phi-2": "Phi"}
    tested = 0
    for claim in CLAIMS["figure-4"]:
        for encoder in ("C", "Sig") if claim.benchmark else ():
            better, worse = (
                published_scores(f"base-{encoder}-{variants[side['language_model']]}")[claim.benchmark].value
                for side in (claim.better, claim.worse)
            )
            assert better > worse, claim.text
            tested += 1
    for claim in CLAIMS["figure-5"]:
        for language in variants.values() if claim.benchmark else ():
            sig, clip = (
                published_scores(f"base-{v}-{language}")[claim.benchmark].value for v in ("Sig", "C")
            )
            assert sig > clip
            tested += 1
    assert tested == 12


def test_a_printed_number_stands_for_another_groups_model() -> None:
    study, scores = study_of(share_0=range(30), share_1=range(36))
    claim = Claim(text="", source="", better={"recipe": "share"}, rival="LLaVA-1.5, 7B, 336 px")
    cells = tuple(replace(cell, published="share-Sig-Phi") for cell in study.cells)
    verdicts = {
        one.benchmark: one for one in judge_claims(replace(study, claims=(claim,), cells=cells), scores)
    }
    assert set(verdicts) == set(published_scores("share-Sig-Phi"))  # LLaVA-1.5 has a number in all nine
    gqa = verdicts["gqa"]
    assert (gqa.worse, gqa.better, gqa.seeds, gqa.by_seed) == (62.0, 82.5, (0, 1), ())
    assert gqa.differences == (75 - 62, 90 - 62)
    assert gqa.published == pytest.approx(62.0 - 62.0)
    assert gqa.difference is not None
    assert gqa.difference.difference == pytest.approx(20.5)
    # the printed number has no error of its own: the interval is that of the measured mean of the seeds
    means = [(float(i < 30) + float(i < 36)) / 2 for i in range(40)]
    error = 100 * stdev(fmean(means[i : i + 2]) for i in range(0, 40, 2)) / math.sqrt(20)
    low, high = gqa.difference.interval
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.12)
    assert gqa.outcome == "holds"
    assert verdicts["textvqa"].outcome == "not measured"
    assert verdicts["textvqa"].published == pytest.approx(59.1 - 58.2)
    absent = replace(claim, rival="Qwen-VL, 7B, 448 px", benchmark="pope")  # a dash in Table 3
    assert judge_claims(replace(study, claims=(absent,)), scores)[0].outcome == "not measured"


@pytest.mark.parametrize(("margin", "outcome"), [(0, "reversed"), (70, "open"), (99, "holds")])
def test_comparable_is_to_be_behind_by_no_more_than_the_margin(margin: float, outcome: str) -> None:
    study, scores = study_of(base_0=range(40), share_0=range(12))  # 70 points behind
    claims = (replace(study.claims[0], margin=margin),)
    assert judge_claims(replace(study, claims=claims), scores)[0].outcome == outcome


def test_the_papers_own_numbers_bear_out_what_it_says_of_other_models() -> None:
    best = published_scores("share-Sig-Phi")
    claims = [claim for claim in CLAIMS["table-3"] if claim.benchmark]
    assert [claim.benchmark for claim in claims] == ["vqav2", "pope"]
    for claim in claims:
        assert best[claim.benchmark].value >= other_scores(claim.rival)[claim.benchmark].value - claim.margin
    with pytest.raises(UnknownNameError, match=r"LLaVA-1\.5, 7B, 336 px"):
        other_scores("LLaVA-1.5")


def test_every_label_of_the_claims_is_a_name_of_the_paper() -> None:
    known = {
        "language_model": {"TinyLlama", "StableLM-2", "Phi-2"},
        "vision_encoder": {"CLIP", "SigLIP"},
        "connector": {"MLP", "Resampler"},
        "data": {"LLaVA-1.5", "ShareGPT4V"},
        "recipe": {"base", "share"},
    }
    for claims in CLAIMS.values():
        for claim in claims:
            assert claim.better != claim.worse
            for axis, label in (*claim.better.items(), *claim.worse.items()):
                assert label in known[axis]
