import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sa_jax.errors import Preempted, UsageError, UserError
from sa_jax.evals.protocol import EvalContext
from sa_jax.evals.records import FREE_SETTINGS
from sa_jax.llama import sampler as sampler_module
from sa_jax.llama.cache import init_cache
from sa_jax.llama.hf import load_hf
from sa_jax.llama.lora import LoraConfig
from sa_jax.llama.model import Llama, with_small_kernels_merged
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.llama.sampling import noise_arguments
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import shardings
from tests.llama.sampling_toys import (
    CONFIG,
    CONTEXT,
    GREEDY,
    IDS,
    LENGTHS,
    PROMPTS,
    RNG,
    SAMPLED,
    SHORT,
    make_params,
    tokens_of,
)
from tests.toys import one_device_mesh


@pytest.fixture(scope="module")
def model():
    return Llama(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return make_params(model)


@pytest.fixture(scope="module")
def sampler(model):
    return Sampler(model, one_device_mesh(), batch_size=4, context_length=CONTEXT)


@functools.partial(jax.jit, static_argnums=0)
def full_forward(model, params, tokens_bs):
    return jax.nn.log_softmax(model.apply({"params": params}, tokens_bs))


def forward_logprobs(model, params, tokens):
    """[len(tokens), V]; padded on the right to one shape, which nothing before it can see."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(full_forward(model, params, padded))[0, : len(tokens)]


def test_cached_decoding_equals_the_full_forward_token_by_token(model, params):
    length = 140
    tokens = jnp.asarray(RNG.integers(0, CONFIG.vocab_size, (3, length)))
    full = full_forward(model, params, tokens)

    @jax.jit
    def step(params, tokens, positions, cache):
        variables = {"params": params}
        hidden, cache = model.apply(variables, tokens, positions, cache, method="decode")
        logits = model.apply(variables, hidden, method="logits")
        return jax.nn.log_softmax(logits), cache

    cache = init_cache(CONFIG, 3, CONTEXT)
    # A prompt of 107 tokens at once, then one at a time.
    for start, end in [(0, 107), *((i, i + 1) for i in range(107, length))]:
        positions = jnp.broadcast_to(jnp.arange(start, end), (3, end - start))
        logprobs, cache = step(params, tokens[:, start:end], positions, cache)
        np.testing.assert_array_equal(logprobs.argmax(-1), full[:, start:end].argmax(-1))
        np.testing.assert_allclose(logprobs, full[:, start:end], atol=1e-4)


def test_training_s_attention_fills_the_same_cache(params):
    """Prompts as accelerators run them, against prompts as decoding runs them."""
    tokens_bs = RNG.integers(0, CONFIG.vocab_size, (2, 100))
    positions_bs = np.broadcast_to(np.arange(100), (2, 100))

    def run(attention, prefill):
        empty = init_cache(CONFIG, 2, 100)
        apply = Llama(CONFIG, attention=attention).apply
        return apply({"params": params}, tokens_bs, positions_bs, empty, prefill, method="decode")

    ours, oracle = run("blockwise", True), run("reference", False)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(oracle), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logprobs_and_greedy_tokens_are_those_of_the_full_forward(sampler, model, params, settings):
    completions = sampler.generate(params, PROMPTS, IDS, settings)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert len(completion.logprobs) == len(completion.tokens)
        logprobs = forward_logprobs(model, params, prompt + completion.tokens)
        predicted = logprobs[len(prompt) - 1 : -1] if completion.tokens else logprobs[:0]
        if settings is GREEDY:
            np.testing.assert_array_equal(predicted.argmax(-1), completion.tokens)
        chosen = predicted[np.arange(len(completion.tokens)), completion.tokens]
        np.testing.assert_allclose(completion.logprobs, chosen, atol=1e-4)


def test_greedy_and_sampled_answers_come_from_one_program(model, params):
    """The likeliest tokens and a draw at a temperature compile nothing twice."""
    sampler = Sampler(model, one_device_mesh(), batch_size=4, context_length=CONTEXT)
    greedy = dataclasses.replace(SAMPLED, temperature=0.0)
    prompts, ids = PROMPTS[:1], IDS[:1]
    plain = tokens_of(sampler.generate(params, prompts, ids, greedy))
    assert tokens_of(sampler.generate(params, prompts, ids, SAMPLED)) != plain
    assert tokens_of(sampler.generate(params, prompts, ids, greedy)) == plain
    assert [f._cache_size() for f in (sampler._prefill, sampler._decode)] == [1, 1]


def test_noise_is_a_function_of_seed_prompt_id_and_position(sampler, model, params):
    """The tokens are those of an independent sampler: full forward, noise written out."""
    completions = sampler.generate(params, PROMPTS[:4], IDS[:4], SAMPLED)
    for prompt, prompt_id, completion in zip(PROMPTS, IDS, completions, strict=False):
        tokens = list(prompt)
        for token in completion.tokens:
            key = jax.random.fold_in(jax.random.key(SAMPLED.seed), prompt_id)
            noise = jax.random.gumbel(jax.random.fold_in(key, len(tokens)), (CONFIG.vocab_size,))
            scores = forward_logprobs(model, params, tokens)[-1] / SAMPLED.temperature + noise
            assert int(scores.argmax()) == token
            tokens.append(token)
    reseeded = dataclasses.replace(SAMPLED, seed=4)
    assert tokens_of(sampler.generate(params, PROMPTS[:4], IDS[:4], reseeded)) != tokens_of(
        completions
    )


def test_tokens_do_not_depend_on_slot_neighbours_or_refill_order(sampler, params):
    """Same compiled shapes: exactly the same tokens and log-probabilities."""
    expected = sampler.generate(params, PROMPTS, IDS, SAMPLED)
    # Rows end at their own time.
    assert {completion.stop_reason for completion in expected} == {"stop", "length"}
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(PROMPTS))
        got = sampler.generate(
            params, [PROMPTS[i] for i in order], [IDS[i] for i in order], SAMPLED
        )
        assert got == [expected[i] for i in order]
    alone = [
        sampler.generate(params, [prompt], [prompt_id], SAMPLED)[0]
        for prompt, prompt_id in zip(PROMPTS, IDS, strict=True)
    ]
    assert alone == expected


@pytest.mark.parametrize("slots", [4, 16])
def test_slots_are_refilled_as_soon_as_enough_are_free(model, sampler, params, slots):
    """As many decode steps as in a simulation: a quarter of the slots is refilled at once."""
    if slots != sampler.batch_size:
        sampler = Sampler(model, one_device_mesh(), batch_size=slots, context_length=CONTEXT)
    prompts = 6 * SHORT[0]
    settings = dataclasses.replace(SAMPLED, stop_token_ids=tuple(range(20)))
    completions = sampler.generate(params, prompts, range(len(prompts)), settings)
    assert len({len(completion.tokens) for completion in completions}) > 8
    # The prefill gives the first token; a stop token is not counted among them.
    left = [len(c.tokens) - (c.stop_reason == "length") for c in completions]
    decoding, steps = [], 0
    while left or decoding:
        wanted = min(len(left), slots // 4)
        if left and slots - len(decoding) >= wanted:
            taken = min(slots - len(decoding), 8, len(left))  # 8: a prefill's rows
            decoding += [n for n in left[:taken] if n > 0]
            left = left[taken:]
        else:
            steps += 1
            decoding = [n - 1 for n in decoding if n > 1]
    assert sampler.stats.decode_steps == steps


@pytest.mark.parametrize("batch_size,steps_per_call", [(1, 5), (16, 1)])
def test_tokens_do_not_depend_on_the_sizes_in_fp32(
    model, params, sampler, batch_size, steps_per_call
):
    other = Sampler(
        model,
        one_device_mesh(),
        batch_size=batch_size,
        context_length=CONTEXT,
        steps_per_call=steps_per_call,
    )
    assert tokens_of(other.generate(params, *SHORT, SAMPLED)) == tokens_of(
        sampler.generate(params, *SHORT, SAMPLED)
    )


@pytest.mark.parametrize(
    "sizes",
    [pytest.param((8, 1, 1), marks=pytest.mark.long), (1, 4, 2), (2, 1, 4)],
    ids=["data8", "fsdp4_tensor2", "data2_tensor4"],
)
def test_sharded_sampling_equals_unsharded(model, params, sampler, sizes):
    """Three mesh shapes; in the last the two kv heads do not divide over the four of tensor."""
    mesh = make_mesh(*sizes)
    sharded = Sampler(model, mesh, batch_size=4, context_length=CONTEXT)
    params_on_mesh = jax.device_put(params, shardings(mesh, params))
    settings = dataclasses.replace(SAMPLED, top_p=0.9)
    prompts, ids = SHORT
    expected = sampler.generate(params, prompts, ids, settings)
    got = sharded.generate(params_on_mesh, prompts, ids, settings)
    assert tokens_of(got) == tokens_of(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.stop_reason == other.stop_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("sizes", [(4, 1, 2), (2, 1, 4)], ids=["heads_cut", "heads_whole"])
def test_sampling_with_the_kernel_of_gpus_equals_that_without(
    model, params, sampler, sizes, monkeypatch, interpreted_kernel
):
    monkeypatch.setattr(sampler_module, "decoding_takes_kernel", lambda *at: True)
    mesh = make_mesh(*sizes)
    with_kernel = Sampler(model, mesh, batch_size=4, context_length=CONTEXT)
    recorded = EvalContext(model, mesh, None, None, (), with_kernel).execution
    assert recorded["decode_kernel"] and "decode_kernel" in FREE_SETTINGS
    got = with_kernel.generate(jax.device_put(params, shardings(mesh, params)), *SHORT, SAMPLED)
    expected = sampler.generate(params, *SHORT, SAMPLED)
    assert tokens_of(got) == tokens_of(expected)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_the_cache_is_cut_over_the_mesh_and_donated(model, params):
    mesh = make_mesh(2, 2, 2)
    sampler = Sampler(model, mesh, batch_size=4, context_length=CONTEXT)
    cache = sampler._init_cache()
    # One slot of four, one kv head of two on each device.
    for leaf, local in ((cache.k, (2, 3, 1, 1, 8, 64)), (cache.v, (2, 3, 1, 64, 1, 8))):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {local}
    params = jax.device_put(params, shardings(sampler.mesh, params))
    zeros = np.zeros(4, np.int32)
    noise = {"seed": np.uint32(0), "temperature": np.float32(1), "top_p": np.float32(1)}
    new, *_ = sampler._decode(
        params, cache, zeros, zeros, zeros + 9, zeros, zeros, np.int32(1), nucleus=False, **noise
    )
    assert all(leaf.is_deleted() for leaf in cache)
    for old, leaf in zip(cache, new, strict=True):
        assert leaf.sharding == old.sharding


def test_decoding_updates_the_cache_in_place(model, params):
    """The compiled program holds one cache, not two: temporaries stay below a cache's size."""
    context = 2048
    config = dataclasses.replace(CONFIG, max_position_embeddings=context)
    model = model.clone(config=config)
    sampler = Sampler(model, one_device_mesh(), batch_size=16, context_length=context)
    cache = sampler._init_cache()
    row = np.zeros(16, np.int32)
    noise = {"seed": np.uint32(0), "temperature": np.float32(1), "top_p": np.float32(1)}
    compiled = sampler._decode.lower(
        params, cache, row, row, row, row, row, np.int32(1), nucleus=False, **noise
    ).compile()
    memory = compiled.memory_analysis()
    cache_bytes = sum(leaf.nbytes for leaf in cache)
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4


def test_every_write_of_a_prefill_is_to_a_place_of_its_own(model, params, monkeypatch):
    """And XLA is told: else GPUs with --xla_gpu_deterministic_ops sort every number of it."""
    sampler = Sampler(model, one_device_mesh(), batch_size=4, context_length=CONTEXT)
    cache, four = sampler._init_cache(), np.zeros(4, np.int32)
    noise = noise_arguments(SAMPLED)
    text = sampler._prefill.lower(
        params, cache, np.zeros((4, 16), np.int32), four, four, four, **noise
    ).as_text()
    writes = re.findall(r'"stablehlo.scatter".*', text)
    assert len(writes) == 4 and all("unique_indices = true" in write for write in writes)
    prefill, slots = sampler._prefill, []

    def spy(params, cache, tokens_bs, lengths_b, slots_b, *rest, **noise):
        slots.append(slots_b.tolist())
        return prefill(params, cache, tokens_bs, lengths_b, slots_b, *rest, **noise)

    monkeypatch.setattr(sampler, "_prefill", spy)
    sampler.generate(params, *SHORT, SAMPLED)
    assert any(max(each) >= 4 for each in slots)  # rows of padding
    assert all(len({*each}) == 4 for each in slots)


def test_greedy_equals_transformers_generate(sampler, params):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).eval()
    with torch.no_grad():
        for name, tensor in hf.state_dict().items():
            tensor.copy_(torch.from_numpy(np.array(_leaf(params, name))))
        expected = []
        for prompt in PROMPTS:
            out = hf.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=GREEDY.max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            expected.append(out[0, len(prompt) :].tolist())
    assert tokens_of(sampler.generate(params, PROMPTS, IDS, GREEDY)) == expected


def _leaf(params, hf_name):
    """The leaf that a Hugging Face parameter name means, as [out, in]."""
    parts = hf_name.removesuffix(".weight").removeprefix("model.").split(".")
    if parts[0] == "embed_tokens":
        return params["embed"]["embedding"]
    if parts[0] == "norm":
        return params["final_norm"]["scale"]
    if parts[0] == "lm_head":
        return params["lm_head"]["kernel"].T
    layer, layers = int(parts[1]), params["layers"]
    if parts[-1].endswith("layernorm"):
        name = "attention_norm" if parts[-1].startswith("input") else "mlp_norm"
        return layers[name]["scale"][layer]
    block = {"self_attn": "attention", "mlp": "mlp"}[parts[2]]
    return layers[block][parts[3].removesuffix("_proj")]["kernel"][layer].T


def test_stories260k_reproduces_its_published_text(shared_data):
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "stories260k"
    # The first sample of the page: greedy, from the start token, 256 steps.
    reference = (folder / "reference_text.md").read_text()
    published = reference.split("-t 0.0\n", 1)[1].split("\n```", 1)[0]
    config, params = load_hf(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    sampler = Sampler(Llama(config), one_device_mesh(), batch_size=2, context_length=512)
    settings = SamplingSettings(max_new_tokens=256, temperature=0.0)
    other = tokenizer.encode("Once upon a time, there was a dog")
    completion, _ = sampler.generate(params, [[config.bos_token_id], other], [0, 1], settings)
    assert tokenizer.decode(completion.tokens).lstrip() == published


def test_stop_tokens_and_length(sampler, params):
    free = sampler.generate(params, PROMPTS, IDS, dataclasses.replace(SAMPLED, stop_token_ids=()))
    assert {completion.stop_reason for completion in free} == {"length"}
    # 148 + 12 = 160 fits, and so do all shorter ones: nothing but max_new_tokens ends them.
    assert {len(completion.tokens) for completion in free} == {12}
    stops = (free[0].tokens[4], free[3].tokens[0], free[5].tokens[11])
    stopped = sampler.generate(
        params, PROMPTS, IDS, dataclasses.replace(SAMPLED, stop_token_ids=stops)
    )
    for whole, cut in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(whole.tokens) if token in stops]
        end = ends[0] if ends else 12
        assert cut.tokens == whole.tokens[:end]
        assert cut.logprobs == whole.logprobs[:end]
        assert cut.stop_reason == ("stop" if ends else "length")
    assert stopped[3].tokens == []  # the very first token stopped it
    assert stopped[5].stop_reason == "stop" or len(stopped[5].tokens) < 12


def test_the_context_limits_the_completion(sampler, params):
    prompts = [PROMPTS[9][:1] * n for n in (CONTEXT - 1, CONTEXT - 2, CONTEXT - 14, 1)]
    settings = SamplingSettings(max_new_tokens=20, temperature=0.0)
    completions = sampler.generate(params, prompts, [0, 1, 2, 3], settings)
    assert [len(completion.tokens) for completion in completions] == [1, 2, 14, 20]
    assert {completion.stop_reason for completion in completions} == {"length"}


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 9])
def test_a_prompt_that_leaves_no_room_is_an_error(sampler, params, length):
    prompts = [PROMPTS[0], [1] * length]
    assert [sampler.fits(prompt) for prompt in prompts] == [True, False]
    with pytest.raises(UserError, match=f"prompt 1 has {length} tokens.* context of {CONTEXT}"):
        sampler.generate(params, prompts, [0, 1], GREEDY)


@pytest.mark.parametrize(
    "field,value",
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(UsageError, match=field):
        dataclasses.replace(GREEDY, **{field: value})


def test_sizes_out_of_range(model):
    with pytest.raises(UsageError, match=f"context_length={CONTEXT + 1}.*={CONTEXT}"):
        Sampler(model, one_device_mesh(), batch_size=1, context_length=CONTEXT + 1)
    with pytest.raises(UsageError, match="batch_size=0"):
        Sampler(model, one_device_mesh(), batch_size=0, context_length=CONTEXT)


def test_should_stop_is_asked_between_device_calls(sampler, params):
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) == 5

    with pytest.raises(Preempted):
        sampler.generate(params, PROMPTS, IDS, GREEDY, should_stop)
    assert len(asked) == 5
    # The sampler is as good as before.
    assert len(sampler.generate(params, PROMPTS, IDS, GREEDY)) == len(PROMPTS)


def test_stats(sampler, params):
    completions = sampler.generate(params, PROMPTS, IDS, SAMPLED)
    stats_ = sampler.stats
    assert stats_.prompt_tokens == sum(LENGTHS)
    assert stats_.new_tokens == sum(len(tokens) for tokens in tokens_of(completions))
    assert stats_.tokens_per_s == pytest.approx(stats_.new_tokens / stats_.seconds)
    assert 0 < stats_.decode_steps < stats_.new_tokens  # several rows a step
    assert 0 < stats_.prefill_seconds < stats_.seconds
    decoding = stats_.seconds - stats_.prefill_seconds
    assert stats_.seconds_per_step == pytest.approx(decoding / stats_.decode_steps)


def test_no_prompts(sampler, params):
    assert sampler.generate(params, [], [], GREEDY) == []


@pytest.mark.parametrize("rank", [2, 32], ids=["apart", "merged"])
def test_adapters_are_used_apart_and_merged(rank):
    lora = LoraConfig(rank, alpha=4.0)
    adapted = Llama(CONFIG, lora=lora)
    tree = make_params(adapted, seed=1)
    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jax.random.normal(jax.random.key(5), leaf.shape) * 0.3
            if path[-1].key == "lora_b"
            else leaf
        ),
        tree,
    )
    assert (with_small_kernels_merged(adapted)[0].lora is None) == (rank == 32)
    sampler = Sampler(adapted, one_device_mesh(), batch_size=4, context_length=CONTEXT)
    completions = sampler.generate(tree, PROMPTS[:3], IDS[:3], GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=False):
        logprobs = forward_logprobs(adapted, tree, prompt + completion.tokens)[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(logprobs.argmax(-1), completion.tokens)
    base = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if path[-1].key == "lora_b" else leaf, tree
    )
    assert tokens_of(sampler.generate(base, PROMPTS[:3], IDS[:3], GREEDY)) != tokens_of(completions)
