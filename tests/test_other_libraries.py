"""A saved model used as any other is, by libraries that know nothing of pathlm: pipelines, adapters, lm-eval's own model."""

import logging

import pytest
import torch
from cases import Case, ids
from checks import decoding_in_any_chunks_is_one_forward_pass, equal, one_row_is_decoded_as_many_are, the_past_cannot_see_the_future
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, pipeline

from pathlm.evaluate.choices import Question, read_questions, score_choices, write_questions
from pathlm.evaluate.harness import choice_task
from pathlm.generate import generate
from pathlm.text.synthetic import open_task, samples
from pathlm.text.synthetic.words import task_tokenizer

WORDS = task_tokenizer([open_task("copy")])
KNOWN = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
ROUTED = {"pool_blocks": 3, "max_route_steps": 4, "block_position_dim": 6}
CODES = ROUTED | {"memory": "canonical", "code_dim": 6, "post_memory": "canonical"}
SAVED = (
    Case("plain", "brian", KNOWN),
    Case("routed", "brian", ROUTED | KNOWN),
    Case("codes", "brian", CODES | KNOWN),
    Case("graph", "brillm", KNOWN | {"edges": 300}),
)


@pytest.fixture(scope="module", params=SAVED, ids=str)
def saved(request, tmp_path_factory):
    """A model, and the folder where `save_pretrained` left it with its tokenizer."""
    place, model = tmp_path_factory.mktemp("saved"), request.param.build(torch.float32)
    model.save_pretrained(place)
    WORDS.save_pretrained(place)
    return model, str(place)


def test_a_text_generation_pipeline_writes_what_our_own_generation_writes(saved):
    model, folder = saved
    prompts = ["copy : a b c =", "copy : d ="]
    new = generate(model, [WORDS(prompt).input_ids for prompt in prompts], max_new_tokens=8, temperature=0, eos_token_id=0)
    expected = [WORDS.decode(row, skip_special_tokens=True).split() for row in new]
    writer = pipeline("text-generation", model=folder, device="cpu")
    assert type(writer.model) is type(model)
    for batch_size in (1, 2):
        found = writer(prompts, max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=batch_size)
        assert [one["generated_text"].split() for (one,) in found] == expected
    torch.manual_seed(0)
    drawn = writer(prompts[0], max_new_tokens=8, do_sample=True, num_return_sequences=4)
    assert len({one["generated_text"] for one in drawn}) > 1 and all(one["generated_text"].startswith(prompts[0]) for one in drawn)


def test_the_model_of_lm_eval_finds_the_accuracies_that_we_find(saved, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, folder = saved
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    stream = samples("copy:max_length=8")
    drawn = [[stream.sample(4 * i + j) for j in range(4)] for i in range(40)]
    made = [Question(" ".join(four[i % 4].prompt), tuple(" ".join(one.answer) for one in four), i % 4) for i, four in enumerate(drawn)]
    write_questions(tmp_path / "copying.jsonl", made)
    found = simple_evaluate(
        "hf", model_args={"pretrained": folder, "add_bos_token": True, "max_length": 64, "device": "cpu"}, batch_size=7,
        tasks=[choice_task(tmp_path / "copying.jsonl")], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0,
    )["results"]["copying"]  # fmt: skip
    ours = {
        score.normalisation: score.accuracy for score in score_choices(model, WORDS, read_questions(tmp_path / "copying.jsonl"), context=64)
    }
    assert (found["acc,none"], found["acc_bytes,none"]) == (ours["raw"], ours["per_byte"])
    assert ours["raw"] != ours["per_byte"], "the normalisations should disagree here, or the test compares one number"


ADAPTED = [
    Case("plain", "brian"),
    Case("routed", "brian", ROUTED),
    Case("two blocks a step", "brian", ROUTED | {"route_top_k": 2, "router_hidden": 8}),
    Case("rows refreshed, biased", "brian", ROUTED | {"left_rows": "refreshed", "attention_bias": True}),
    Case("codes", "brian", CODES),
    Case("two branches", "brian", ROUTED | {"route_beams": 2}),
]
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # asked for by peft


def with_adapters(model, *, drawn=True):
    """The model with low-rank adapters beside every matrix, also those that it reads instead of calling; `drawn` ones are not zero."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=layers, init_lora_weights=not drawn)
    return get_peft_model(model, lora).eval()


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_with_adapters_in_every_layer_the_contract_holds(case):
    model, tokens = with_adapters(case.build()), ids(2)
    before, after = case.build()(tokens).logits, model(tokens).logits
    assert (after - before).abs().max() > 0.1
    with model.disable_adapter():
        equal(model(tokens).logits, before)
    the_past_cannot_see_the_future(model)
    decoding_in_any_chunks_is_one_forward_pass(model)
    one_row_is_decoded_as_many_are(model)


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_the_loss_is_that_of_the_adapted_logits(case):
    model, tokens = with_adapters(case.build()), ids(2)
    told = model(tokens, labels=tokens)
    torch.testing.assert_close(told.loss, F.cross_entropy(told.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_merged_adapters_change_nothing_also_after_the_model_has_been_used_without_them(case):
    model, tokens = case.build(), ids(1)
    one_row_is_decoded_as_many_are(model)
    model = with_adapters(model)
    expected = model(tokens).logits
    merged = model.merge_and_unload()
    equal(merged(tokens).logits, expected)
    one_row_is_decoded_as_many_are(merged)


@pytest.mark.parametrize("case", ADAPTED, ids=str)
def test_training_moves_the_adapters_and_nothing_else(case):
    model, tokens = with_adapters(case.build(), drawn=False).train(), ids(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    untaught = "pool.router"  # what a router learns from, a curriculum says
    assert {name for name in before if "lora_" in name and untaught not in name} <= moved
    assert all("lora_" in name for name in moved)


def test_adapters_saved_alone_are_found_again_with_the_model_they_belong_to(tmp_path):
    case, tokens = ADAPTED[1], ids(2)
    case.build(torch.float32).save_pretrained(tmp_path / "model")
    model = with_adapters(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    model.save_pretrained(tmp_path / "adapters", save_embedding_layers=False)
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters").eval()
    assert torch.equal(found(tokens).logits, model(tokens).logits)
