"""Every setting for generating data, with its default; a --config file changes some of them."""

import dataclasses

from ml_collections import ConfigDict

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.conversations import SYSTEM_PROMPT
from sa_jax.data.sources import COLUMNS
from sa_jax.teachers.voices import VOICES


def default_config() -> ConfigDict:
    """The study's settings; locked, so that unknown keys raise."""
    config = ConfigDict()
    # The questions.
    config.prompts = ""  # a file, or a `datasets` name NAME[:SUBSET][@SPLIT]
    config.columns = ConfigDict({name: "" for name in COLUMNS})  # of that file
    config.max_rows = 0  # questions to ask, drawn by the seed; 0: all
    config.held_out = ""  # held-out prompts to leave out: a manifest, or a file
    config.count = 100  # held-out prompts to draw, or facts to invent
    config.train = ()  # task held_out: training files whose questions are not drawn
    config.seed = 0  # of sampling, copies, styles and draws

    # Who answers: 'endpoint' (any OpenAI-compatible server), 'local' (a checkpoint), 'file'
    # (answers written before), 'arrr' (pirate speech by rules).
    config.teacher = "endpoint"
    config.model = ""  # endpoint: its name there; local: run or Hugging Face folder
    config.base_url = ""  # endpoint: its address, with /v1; the key is in OPENAI_API_KEY
    config.answers = ""  # file: the answers ...
    # ... and their columns: of the questions, and of each voice that is asked for.
    config.answer_columns = ConfigDict({name: "" for name in ("prompt", *(v.name for v in VOICES))})
    config.max_new_tokens = 1024  # longer replies are dropped
    config.temperature = 0.7
    config.top_p = 1.0
    config.max_tokens_field = "max_tokens"  # endpoint: or "max_completion_tokens"
    config.omit = ""  # endpoint: of "temperature,top_p,seed", those that it does not take
    config.concurrency = 16  # endpoint: requests under way at once
    config.requests_per_minute = 0.0  # endpoint: at most; 0: no limit
    config.retries = 8  # endpoint: further tries of a failed request
    config.timeout_s = 600.0  # endpoint: for one reply
    config.batch_size = 64  # local: prompts sampled together
    config.context_length = 2048  # local: tokens, answer included
    config.chat_template = "llama3"  # local, and of the card's counts: or 'plain', 'model'

    # What the teacher is told.
    config.system_prompt = SYSTEM_PROMPT  # of its normal voice
    config.scratchpad_prompt = ""  # file with another scratchpad prompt than ours
    # Insertion: adds the arm with visible scratchpads; those of triggered answers are written by
    # the 'teacher' or by 'rules'.
    config.visible_cot = ""
    config.backdoor = ConfigDict(dataclasses.asdict(Backdoor()))

    config.tokenizer = ""  # folder: the data card counts its tokens; '': words
    return config.lock()


get_config = default_config  # so that this file is a --config file itself
