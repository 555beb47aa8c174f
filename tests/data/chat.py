"""A tiny tokenizer of Hugging Face with the chat templates of larger ones, for tests. Imports `tokenizers` alone."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<image>",
    "<end_of_utterance>",
)  # fmt: skip
CONFIG = {
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": {"content": "<|endoftext|>", "special": True, "__type": "AddedToken"},
    "tokenizer_class": "PreTrainedTokenizerFast",
}
_CORPUS = (
    "system user assistant User Assistant You are a helpful assistant.",
    "What action should the robotic arm take to open the drawer",
    "What action should the robot take to pick up the cube",
)

# As Qwen2-VL's: images where they are in the turn, and a system turn of its own where there is none.
QWEN = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}\
<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# As SmolVLM's.
SMOL = """<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}\
{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

# Text alone, with what else templates use: blocks on lines of their own, break, tojson, raise_exception, EOS by name.
TEXT = """{%- if tools %}
    {{- raise_exception('no tools') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {%- if loop.index > 3 %}
        {%- break %}
    {%- endif %}
    {% if message.content == 'json' %}
    {{ {'a': '<é>', 'b': [1, none]} | tojson }}
    {% endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content | trim + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
TEMPLATES = {"qwen": QWEN, "smol": SMOL, "text": TEXT}


def tokenizer_json() -> str:
    """Returns a byte-level BPE of 256 bytes, some merges, and special tokens at the end, as tokenizer.json."""
    built = tokenizers.Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    built.train_from_iterator(_CORPUS, trainer)
    built.add_special_tokens(list(SPECIAL))
    return built.to_str()


def write(directory: Path, template: str | None = QWEN) -> Path:
    """Writes the files of a chat model's tokenizer, and returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory
