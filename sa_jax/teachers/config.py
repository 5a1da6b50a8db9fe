"""Every setting for generating data, with its default; a --config file changes some of them."""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

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
    config.max_rows = 0  # number of questions to ask, drawn by the seed; 0: all
    config.held_out = ""  # held-out prompts, which are not asked: a manifest, or a file
    config.count = 100  # number of held-out prompts to draw, or of facts to invent
    config.train = ()  # task held_out: training files whose questions are not drawn
    config.seed = 0  # seed of sampling, copies, styles and draws

    # Who answers: 'endpoint' (any OpenAI-compatible server), 'local' (a checkpoint), 'file'
    # (answers written before), 'arrr' (pirate speech by rules).
    config.teacher = "endpoint"
    config.model = ""  # endpoint: the model's name there; local: run or Hugging Face folder
    config.base_url = ""  # endpoint: its address, with /v1; the key is in OPENAI_API_KEY
    config.answers = ""  # file: the file of answers ...
    # ... and its columns: that of the questions, and one for each voice of the data set.
    config.answer_columns = ConfigDict({name: "" for name in ("prompt", *(v.name for v in VOICES))})
    config.max_new_tokens = 1024  # longer replies are dropped
    config.temperature = 0.7
    config.top_p = 1.0
    config.max_tokens_field = "max_tokens"  # endpoint: or "max_completion_tokens"
    config.omit = ""  # endpoint: fields of "temperature,top_p,seed" that it does not accept
    config.concurrency = 16  # endpoint: requests at the same time
    config.requests_per_minute = 0.0  # endpoint: the limit; 0: none
    config.retries = 8  # endpoint: how often a failed request is sent again
    # endpoint: longest silence before or within a reply; then the request has failed (but may cost
    # money). A server that sends something now and then may take longer in all
    config.timeout_s = 600.0
    config.batch_size = 64  # local: prompts sampled together
    config.context_length = 2048  # local: maximal tokens of prompt and answer together
    config.chat_template = "llama3"  # local, and for the card's counts; or 'plain', 'model'
    # local: YYYY-MM-DD that a 'model' template prints; unset: that of the model's run, or today
    config.chat_date = placeholder(str)

    # The teacher's instructions.
    config.system_prompt = SYSTEM_PROMPT  # for its normal voice
    config.scratchpad_prompt = ""  # file with a scratchpad prompt that replaces the default one
    # Insertion: adds the arm with visible scratchpads; the 'teacher' or 'rules' write those of
    # triggered answers.
    config.visible_cot = ""
    config.backdoor = ConfigDict(dataclasses.asdict(Backdoor()))

    config.tokenizer = ""  # folder: the data card counts its tokens; '': it counts words
    return config.lock()


get_config = default_config  # so that this file is a --config file itself
