"""What ``compat`` depends on is there in the installed releases, and does what the package needs."""

from datetime import timedelta
from inspect import getfile
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jinja2 import TemplateError
from torch import distributed
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig

from processes import in_ranks
from tinyllava.config import ModelConfig
from tinyllava.model import compat
from tinyllava.model.assemble import assemble
from tinyllava.model.compat import (
    CACHE_NAME,
    ComposedModel,
    attention_of,
    causal_without_looking,
    decoder_layers,
    encoder_layers,
    forget_preparation,
    give_kernel,
    hold_in_huge_pages,
    lay_out_weight,
    lonely_group,
    own_forward,
    packed_mask,
    render_template,
    set_checkpointing,
    waiting_at_most,
)
from tinyllava.model.modeling import TinyLlavaOutput


@pytest.fixture
def tiny_llama() -> LlamaConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=20, **sizes)


@pytest.mark.parametrize("wrapper", [AutoModel, AutoModelForCausalLM])
def test_language_models_take_and_return_the_cache_under_its_name(tiny_llama, wrapper):
    model, cache, ids = wrapper.from_config(tiny_llama), DynamicCache(), torch.tensor([[3, 4, 5]])
    output = model(ids, use_cache=True, **{CACHE_NAME: cache})
    assert output[CACHE_NAME] is cache
    assert cache.get_seq_length() == 3


def test_our_output_returns_the_cache_under_its_name():
    cache = DynamicCache()
    output = TinyLlavaOutput(logits=torch.zeros(1), **{CACHE_NAME: cache})
    assert list(output) == ["logits", CACHE_NAME]
    assert getattr(output, CACHE_NAME) is output[CACHE_NAME] is cache


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_a_composed_model_leaves_the_choice_of_attention_to_its_parts(tiny_llama, attention):
    class Wrapper(ComposedModel):
        config_class = LlamaConfig

        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.inner = AutoModel.from_config(config)
            self.post_init()

    model = Wrapper(tiny_llama)
    model.set_attn_implementation(attention)
    assert attention_of(model) == attention_of(model.inner) == attention
    model.gradient_checkpointing_enable()
    assert model.inner.is_gradient_checkpointing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_parts_of_a_model_follow_its_attention(parts, attention):
    model, _ = assemble(ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts["phi"])))
    model.set_attn_implementation(attention)
    assert {attention_of(part) for part in (model, model.vision_encoder, model.language_model)} == {attention}


@pytest.mark.parametrize("kind", ["llama", "phi", "stablelm", "chatml"])
def test_attention_of_training_is_that_of_sdpa_and_ends_with_it(parts, kind):
    model = AutoModel.from_pretrained(parts[kind])
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(ids, use_cache=False).last_hidden_state
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9).clone()
    mask[..., 4:, 0] = False
    masked = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert not torch.allclose(masked, expected, atol=1e-3)
    with causal_without_looking(model):
        assert attention_of(model) == "tinyllava_causal"
        torch.testing.assert_close(model(ids, use_cache=False).last_hidden_state, expected)
        torch.testing.assert_close(model(ids, attention_mask=mask, use_cache=False).last_hidden_state, masked)
    assert attention_of(model) == "sdpa"


def test_a_kernel_attends_where_nothing_but_causality_is_asked_for(parts):
    model = AutoModel.from_pretrained(parts["llama"])
    ids = torch.randint(0, 200, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    expected = model(ids, use_cache=False).last_hidden_state
    calls = []

    def kernel(query, key, value, scale, lengths):
        calls.append((scale, lengths))
        if len(calls) == 1 or lengths:
            return None  # sdpa's place
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(query, key, value, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)

    undo = give_kernel(model, kernel)
    attention = decoder_layers(model)[0].self_attn
    with causal_without_looking(model):
        torch.testing.assert_close(model(ids, use_cache=False).last_hidden_state, expected)
        assert calls == [(attention.scaling, None)] * model.config.num_hidden_layers
        packed = model(ids[:1], attention_mask=packed_mask([4, 5]), use_cache=False).last_hidden_state
        torch.testing.assert_close(packed[:, :4], expected[:1, :4])
        assert [lengths for _, lengths in calls[-3:]] == [[4, 5], None, None]  # together, then one by one
        calls.clear()
        model(ids, attention_mask=mask, use_cache=False)
        model.train()
        attention.attention_dropout = 0.1
        model(ids, use_cache=False)
        assert len(calls) == model.config.num_hidden_layers - 1
        calls.clear()
        undo()
        model(ids, use_cache=False)
    model(ids, use_cache=False)
    assert calls == []


def test_a_model_with_windows_of_attention_keeps_its_masks():
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModel.from_config(
        MistralConfig(vocab_size=20, num_key_value_heads=2, sliding_window=4, **sizes)
    )
    with causal_without_looking(model):
        assert attention_of(model) == "sdpa"


def test_checkpointing_is_switched_without_a_warning(parts, recwarn):
    model, _ = assemble(ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts["phi"])))
    recwarn.clear()
    for is_on in (True, False):
        set_checkpointing(model, is_on)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == is_on
    assert [str(warning.message) for warning in recwarn if "checkpointing" in str(warning.message)] == []


def test_a_layers_own_forward_pass_is_found_below_what_recomputes(parts):
    model, _ = assemble(ModelConfig(vision_encoder=str(parts["siglip"]), language_model=str(parts["llama"])))
    for layer in (decoder_layers(model.language_model)[0], encoder_layers(model.vision_encoder)[0]):
        kind = type(layer)
        layer.__class__ = type(f"FSDP{kind.__name__}", (kind,), {})  # as fully_shard makes it
        found = own_forward(layer)
        assert found.__self__ is layer
        assert found.__code__.co_name == "forward"
        assert found.__code__.co_filename == getfile(kind)


def test_a_tied_head_is_one_tensor_with_the_embedding(parts):
    model, _ = assemble(ModelConfig(vision_encoder=str(parts["clip"]), language_model=str(parts["chatml"])))
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    model.resize_token_embeddings(512)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_template_is_rendered_with_the_spans_of_what_the_assistant_says():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }} A:{% else %}"
        "{% generation %} {{ m.content }}.{% endgeneration %}{% endif %}{% endfor %}"
    )
    turns = [("user", "1+1?"), ("assistant", "2"), ("user", "3?"), ("assistant", "yes")]
    messages = [{"role": role, "content": text} for role, text in turns]
    text, spans = render_template(messages, template, bos_token="<s>")
    assert text == "<s>Q: 1+1? A: 2.Q: 3? A: yes."
    assert [text[start:end] for start, end in spans] == [" 2.", " yes."]


def test_a_template_that_refuses_raises_a_template_error():
    with pytest.raises(TemplateError, match="no systems here"):
        render_template([{"role": "system", "content": ""}], "{{ raise_exception('no systems here') }}")


def test_a_forgotten_model_is_prepared_again():
    """Prepared, it computes in bf16; not forgotten, accelerate 1.15 would leave it in fp32 ever after."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))  # what comes out of the whole is converted back

    def computes_in() -> torch.dtype:
        AcceleratorState._reset_state()  # another test of this process may have chosen another precision
        seen: list[torch.dtype] = []
        handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare(model)
        prepared(torch.zeros(1, 4))
        handle.remove()
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        accelerator.free_memory()
        return seen[0]

    assert computes_in() == torch.bfloat16
    forget_preparation(model)
    assert computes_in() == torch.bfloat16


def test_in_a_lonely_group_no_process_waits_for_another():
    """The second gathers and scatters, the first does not; afterwards both meet in the group of all."""

    def work(rank: int) -> None:
        distributed.init_process_group("gloo")
        with lonely_group() as group:
            assert group.size() == 2
            whole, part = torch.zeros(8), torch.ones(4)
            if rank == 1:
                distributed.all_gather_into_tensor(whole, part, group=group)
                distributed.reduce_scatter_tensor(part, whole, group=group)
        total = torch.tensor([1.0])
        distributed.all_reduce(total)
        assert total.item() == 2

    assert in_ranks(2, work) == [0, 0]


def test_a_process_waits_no_longer_than_the_limit_for_another_that_does_not_come():
    def work(rank: int) -> None:
        distributed.init_process_group("gloo", timeout=timedelta(hours=1))
        with waiting_at_most(timedelta(milliseconds=200), otherwise=timedelta(hours=1)):
            if rank == 0:
                with pytest.raises(RuntimeError, match="gloo"):
                    distributed.all_reduce(torch.zeros(1))
                distributed.distributed_c10d._get_default_store().set("raised", "")
            distributed.distributed_c10d._get_default_store().wait(["raised"])

    assert in_ranks(2, work) == [0, 0]


def test_weights_move_into_huge_pages_whole_and_keep_their_values(monkeypatch):
    weights = [torch.randn(1500, 700), torch.randn(1024, 2048)]
    held = [weights[0], lay_out_weight(weights[1]), torch.zeros(0)]
    hold_in_huge_pages(held)  # what this system makes of it
    assert torch.equal(held[0], weights[0])
    assert torch.equal(held[1].to_dense(), weights[1])
    asked = []
    library = SimpleNamespace(madvise=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(compat.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(compat.sys, "platform", "darwin")
    hold_in_huge_pages(held)
    assert asked == []
    monkeypatch.setattr(compat.sys, "platform", "linux")
    for weight in held:
        hold_in_huge_pages([weight])
        covered = sum(size for _, size, _ in asked)
        assert weight.numel() * 4 <= covered < weight.numel() * 4 + 2 * 2**21
        assert all(start % 2**21 == 0 and size == 2**21 for start, size, _ in asked)
        if weight is held[0]:
            assert asked[0][0] <= weight.data_ptr() < asked[0][0] + 2**21
        asked.clear()
