"""How much the starter trains: what fits, what repeats, and what a stopped run resumes with."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tinyllava.data.packages import default_model
from tinyllava.errors import ConfigError, DataError
from tinyllava.starter.amounts import (
    FIXED_SECONDS,
    NUM_START_IMAGES,
    Begun,
    Speed,
    StepClock,
    fit_amounts,
    measure_speed,
    read_begun,
    save_begun,
    share_out,
    total,
)
from tinyllava.starter.datasets.default import LabelledImage, Question
from tinyllava.starter.recipe import starter_model
from tinyllava.starter.records import AMOUNTS, Amount
from tinyllava.starter.run import StarterParts, Work, choose_amounts, offer_model, run_starter

NUM_IMAGES = {"easy_vqa": 3132, "drawn": 1400, "grocery_store": 732}
FAST = Speed(image_seconds=0.01, caption_seconds=0.015, conversation_seconds=0.2)


def seconds_by_hand(speed: Speed, amounts: dict[str, Amount]) -> float:
    seconds = FIXED_SECONDS
    for name, amount in amounts.items():
        images = min(NUM_IMAGES[name], max(amount.captions, amount.conversations, NUM_START_IMAGES))
        seconds += images * speed.image_seconds
        seconds += amount.captions * speed.caption_seconds + amount.conversations * speed.conversation_seconds
    return seconds


@pytest.mark.parametrize("minutes", [3, 12, 60])
@pytest.mark.parametrize("slower", [1, 2.5])
def test_the_minutes_are_filled_and_not_exceeded(minutes: float, slower: float) -> None:
    speed = Speed(
        image_seconds=0.01 * slower, caption_seconds=0.015 * slower, conversation_seconds=0.2 * slower
    )
    amounts = fit_amounts(speed, minutes, NUM_IMAGES, AMOUNTS["default"])
    seconds = seconds_by_hand(speed, amounts)
    assert 0.98 * 60 * minutes < seconds <= 60 * minutes + speed.conversation_seconds


def test_a_faster_machine_trains_more_in_the_same_proportions() -> None:
    base = AMOUNTS["default"]
    slow = Speed(image_seconds=0.02, caption_seconds=0.03, conversation_seconds=0.5)
    less, more = (fit_amounts(speed, 12, NUM_IMAGES, base) for speed in (slow, FAST))
    for name in base:
        assert less[name].conversations < more[name].conversations
        assert less[name].captions < more[name].captions
        share = base[name].conversations / total(base).conversations
        assert more[name].conversations == pytest.approx(share * total(more).conversations, abs=1)


def test_too_few_minutes_are_refused_with_the_number_that_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"--minutes 0\.5: this machine needs \d\.\d minutes"):
        fit_amounts(FAST, 0.5, NUM_IMAGES, AMOUNTS["default"])


def test_printed_totals_give_the_same_amounts_again() -> None:
    for minutes in (2, 5, 12, 31):
        amounts = fit_amounts(FAST, minutes, NUM_IMAGES, AMOUNTS["default"])
        assert share_out(total(amounts), AMOUNTS["default"]) == amounts


def test_amounts_are_saved_and_read_and_damage_is_named(tmp_path: Path) -> None:
    assert read_begun(tmp_path) is None
    begun = Begun(amounts=AMOUNTS["full"], minutes=12.0)
    save_begun(tmp_path, begun)
    assert read_begun(tmp_path) == begun
    for damage in ("{", "[1]", json.dumps({"amounts": {"easy_vqa": {"captions": 1}}})):
        (tmp_path / "amounts.json").write_text(damage)
        with pytest.raises(DataError, match=r"amounts\.json: does not contain the amounts of a run"):
            read_begun(tmp_path)


def parts_without_images() -> StarterParts:
    return StarterParts(model=starter_model(Path("language"), Path("vision")), images=())


def test_given_amounts_are_taken_as_they_are_and_nothing_is_timed(tmp_path: Path) -> None:
    amounts = choose_amounts(
        tmp_path, parts_without_images(), Work(total=Amount(captions=160, conversations=320))
    )
    assert amounts == {
        "easy_vqa": Amount(captions=50, conversations=120),
        "drawn": Amount(captions=30, conversations=80),
        "grocery_store": Amount(captions=80, conversations=120),
    }
    # Run again, with the same words or with none: the amounts are those of the folder.
    for work in (Work(total=Amount(captions=160, conversations=320)), Work()):
        assert choose_amounts(tmp_path, parts_without_images(), work) == amounts


@pytest.mark.parametrize(
    "work", [Work(total=Amount(captions=161, conversations=320)), Work(length="full"), Work(minutes=30)]
)
def test_a_folder_that_was_begun_with_something_else_is_refused(work: Work, tmp_path: Path) -> None:
    save_begun(tmp_path, Begun(amounts=AMOUNTS["default"], minutes=12.0))
    before = (tmp_path / "amounts.json").read_text()
    with pytest.raises(ConfigError, match=r"started with 1,600 captions and 1,600 .*, chosen for 12 minutes"):
        choose_amounts(tmp_path, parts_without_images(), work)
    assert (tmp_path / "amounts.json").read_text() == before


def test_the_same_minutes_resume_what_was_chosen(tmp_path: Path) -> None:
    save_begun(tmp_path, Begun(amounts=AMOUNTS["full"], minutes=30.0))
    assert choose_amounts(tmp_path, parts_without_images(), Work(minutes=30)) == AMOUNTS["full"]


def test_the_starter_replaces_its_own_link_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path))
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    offer_model(first, replace=False)
    default = default_model()
    offer_model(second, replace=False)
    assert default.resolve() == first
    offer_model(second, replace=True)
    assert default.resolve() == second
    second.rmdir()  # a link to nothing
    offer_model(first, replace=False)
    assert default.resolve() == first


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_in_the_place_of_the_link_is_kept_and_told_before_training(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINYLLAVA_CACHE", str(tmp_path))
    default = default_model()
    default.mkdir(parents=True)
    if kind == "folder":
        (default / "mine").touch()
    else:
        default.rmdir()
        default.touch()
    offer_model(tmp_path, replace=False)  # a short run leaves it alone
    for work in (lambda: offer_model(tmp_path, replace=True), lambda: run_starter(tmp_path / "run", Work())):
        with pytest.raises(ConfigError, match=rf"starter/model: a {kind}, but .* Move it away.* mv .*-mine"):
            work()
    assert (default / "mine").exists() or default.is_file()
    assert not (tmp_path / "packages").exists()


def test_the_speed_is_measured_on_the_runs_own_stages(parts: dict[str, Path], tmp_path: Path) -> None:
    images = []
    for number in range(24):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (20, 20), (number * 10, 0, 0)).save(file)
        questions = tuple(Question(kind="yes_no", text=f"Is it {n}?", answer="yes") for n in range(5))
        images.append(
            LabelledImage(
                name=f"easy_vqa/{number}.png",
                data=file.read_bytes(),
                caption="a red circle",
                questions=questions,
                is_held_out=False,
            )
        )
    speed = measure_speed(starter_model(parts["chatml"], parts["siglip"]), images)
    assert 0 < speed.image_seconds < 5
    assert 0 < speed.caption_seconds < 5
    assert 0 < speed.conversation_seconds < 5


@pytest.mark.parametrize("slow", [(), (0,), (0, 1, 2), (0, 9, 10), (5, 6, 7)])
def test_a_burst_of_another_program_does_not_change_the_measured_step(slow: tuple[int, ...]) -> None:
    clock, now = StepClock(), 0.0
    clock.ends.append(now)
    for step in range(11):
        now += 3.0 if step in slow else 0.5
        clock.ends.append(now)
    assert clock.usual_step() == 0.5
