"""The plans that are shipped, what each of their requests asks for, and plans that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deployments.controls.framing import framing_of
from deployments.errors import InvalidRequest
from serve.attachments import with_pictures
from serve.presets import load_presets
from serve.schemas import GenerateRequest
from tests.evaluation_subjects import sample, samples
from training.evaluation.adherence import LabelAdherence
from training.evaluation.cases import Case, Subject, cases, lacking
from training.evaluation.plan import Plan, load_plan
from training.mini.world.captions import words_of
from training.mini.world.scene import CLOTHES, SCENES

SHIPPED = ("character", "mini")
_FRAMINGS = {"close_up": "headshot", "portrait": "half", "full": "full"}


def _whole(**changes: Any) -> Subject:
    usual: dict[str, Any] = {"name": "ada", "references": samples("ada"), "lora": "lora_1", "trigger": "ohwx woman", "noun": "woman"}
    return Subject(**(usual | changes))


def _first(found: list[Case], configuration: str, framing: str = "close_up") -> Case:
    return next(case for case in found if case.configuration.name == configuration and case.prompt.framing == framing)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_request_of_a_shipped_plan_is_one_that_the_service_reads(name: str) -> None:
    presets = load_presets()
    for case in cases(load_plan(name), [_whole()]):
        body = with_pictures(case.fields)
        request = GenerateRequest.model_validate(body)
        assert request.workflow is None or request.workflow in presets
        if request.workflow is not None:
            presets[request.workflow].request_type.model_validate({key: value for key, value in body.items() if key != "workflow"})


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_plan_has_nine_prompts_three_of_each_framing(name: str) -> None:
    prompts = load_plan(name).prompts
    assert len(prompts) == 9
    for framing, words in _FRAMINGS.items():
        own = [prompt for prompt in prompts if prompt.framing == framing]
        assert len(own) == 3 and all(framing_of(prompt.text) == words for prompt in own)


def test_the_four_configurations_of_a_character() -> None:
    found = cases(load_plan("character"), [_whole()])
    assert [item.label for item in load_plan("character").configurations] == [
        "base FLUX", "+ LoRA", "+ LoRA + PuLID", "+ LoRA + PuLID + pose",
    ]  # fmt: skip
    base, lora, pulid = (_first(found, name).fields for name in ("base", "lora", "lora_pulid"))
    assert "loras" not in base and "reference_images" not in base and "photo of woman," in base["prompt"]
    assert lora["loras"] == [{"id": "lora_1", "scale": 1.0}] and "photo of ohwx woman," in lora["prompt"]
    assert len(pulid["reference_images"]) == 4 and pulid["pose"] == "none" and pulid["weight"] == 0.4
    assert _first(found, "full").fields["pose"] == "none"
    assert _first(found, "full", "full").fields["pose"] == "full-left-arm-raised"
    assert len({(case.key.prompt, case.key.seed) for case in found}) == 36 and len(found) == 4 * 36


def test_minis_prompts_are_in_its_own_words_and_expect_what_they_say() -> None:
    plan = load_plan("mini")
    LabelAdherence(plan.labels or "", plan.prompts)  # would refuse a label that nobody can tell
    for prompt in plan.prompts:
        assert prompt.expects["scene"] in prompt.text and prompt.expects["clothes"] in prompt.text
        assert prompt.expects["scene"] in SCENES and prompt.expects["clothes"] in CLOTHES
        assert "ohwx" not in words_of(prompt.text)
    called = _first(cases(plan, [_whole(trigger="ada")]), "lora").fields["prompt"]
    assert called == f"ada, {plan.prompts[0].text}"  # as its captions were when it was trained


def test_what_a_person_lacks_is_left_out_and_said() -> None:
    plan, without = load_plan("mini"), _whole(lora=None)
    assert {case.configuration.name for case in cases(plan, [without])} == {"base", "pulid"}
    assert lacking(plan, [without]) == dict.fromkeys(("lora", "lora_pulid", "full"), "ada has no lora")
    with pytest.raises(InvalidRequest, match="lack"):
        cases(plan.only(("lora",)), [without])


def test_a_character_is_named_by_its_id() -> None:
    fields = _first(cases(load_plan("mini"), [_whole(identity={"character_id": "character_1"})]), "pulid").fields
    assert fields["character_id"] == "character_1" and "reference_images" not in fields


def test_what_is_asked_for_has_a_name_that_changes_with_it() -> None:
    plan = load_plan("mini")
    first, again = (_first(cases(plan, [_whole()]), "pulid") for _ in range(2))
    assert first.asked == again.asked
    others = [_whole(references=[sample("ada", 1)]), _whole(references=[sample("bruno", 1), *samples("ada", (2, 3, 4))])]
    changed = [_first(cases(plan, [subject]), "pulid").asked for subject in others]
    slower = _first(cases(plan.but(fields={"num_inference_steps": 5}), [_whole()]), "pulid").asked
    assert len({first.asked, *changed, slower}) == 4


def test_two_people_need_two_names() -> None:
    with pytest.raises(InvalidRequest, match="own name"):
        cases(load_plan("mini"), [_whole(name="Ada B"), _whole(name="Ada-B")])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds: [1, 1]", "`seeds` has 1 more than once"),
        ("surprise: 1", "surprise: Extra inputs"),
        ("prompts: [{name: a b, framing: full, text: x}]", "prompts.0.name"),
        ("prompts: [", "is no YAML"),
    ],
)
def test_a_plan_that_is_wrong_says_where(tmp_path: Path, text: str, said: str) -> None:
    whole = "faces: {faces: a, judge: b, parser: c}\nconfigurations: [{name: base, label: base}]\n"
    usual = {"seeds": "seeds: [1]\n", "prompts": "prompts: [{name: a, framing: full, text: x}]\n"}
    path = tmp_path / "plan.yaml"
    path.write_text(whole + "".join(line for key, line in usual.items() if not text.startswith(key)) + text)
    with pytest.raises(InvalidRequest, match=said):
        load_plan(str(path))


def test_a_plan_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(InvalidRequest) as caught:
        load_plan("nothing")
    assert caught.value.remedy is not None and "character, mini" in caught.value.remedy
    with pytest.raises(InvalidRequest, match="no configuration nobody"):
        load_plan("mini").only(("nobody",))


def test_seeds_and_configurations_can_be_chosen() -> None:
    plan = load_plan("mini").only(("pulid", "base")).but(seeds=(1,))
    assert isinstance(plan, Plan) and [item.name for item in plan.configurations] == ["base", "pulid"]
    assert len(cases(plan, [_whole()])) == 18
