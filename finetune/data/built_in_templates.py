"""The built-in chat templates: general ones, and those of model families as they publish them.

None of them writes a BOS: a tokenizer that uses one puts it first, in training and in the export.
"""

_QUESTION_ANSWER = """\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content }}

{% elif message.role == 'user' %}### Question:
{{ message.content }}

{% else %}### Answer:
{{ message.content }}{{ eos_token }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}### Answer:
{% endif %}"""

_ALPACA = """\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content }}

{% elif message.role == 'user' %}\
{% if message.context %}Below is an instruction that describes a task, paired with an input that \
provides further context. Write a response that appropriately completes the request.

### Instruction:
{{ message.content }}

### Input:
{{ message.context }}

{% else %}{% if loop.index0 < 2 %}Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

{% endif %}### Instruction:
{{ message.content }}

{% endif %}\
{% else %}### Response:
{{ message.content }}{{ eos_token }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}### Response:
{% endif %}"""

_LLAMA2 = """\
{% for message in messages %}\
{% if message.role == 'system' %}{% elif message.role == 'user' %}[INST] \
{% if loop.index0 == 1 and messages[0].role == 'system' %}<<SYS>>
{{ messages[0].content }}
<</SYS>>

{% endif %}{{ message.content }} [/INST]\
{% else %} {{ message.content }} {{ eos_token }}{% endif %}\
{% endfor %}"""

_CHATML = """\
{% for message in messages %}\
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_PLAIN = """\
{% for message in messages %}\
{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\
{% endfor %}"""

# FastChat's conversation template vicuna_v1.1, with its system message where a row has none.
_VICUNA = """\
{% if messages[0].role == 'system' %}{% set system = messages[0].content %}\
{% else %}{% set system = 'A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}{% endif %}\
{% if system %}{{ system }} {% endif %}\
{% for message in messages %}\
{% if message.role == 'user' %}USER: {{ message.content }} {% endif %}\
{% if message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

# Llama 3: from 3.1 on its own template also writes dates and calls of tools.
_LLAMA3 = """\
{% for message in messages %}\
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>\
{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

# Gemma 1 to 3; the system message begins the first question, as in Gemma 3.
_GEMMA = """\
{% for message in messages %}{% if message.role != 'system' %}\
<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}{{ message.content | trim }}<end_of_turn>
{% endif %}{% endfor %}\
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

_PHI3 = """\
{% for message in messages %}\
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor %}\
{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""

# Mistral 7B v0.3 and Mixtral 8x22B; the system message begins the first question, as in v0.1.
_MISTRAL = """\
{% for message in messages %}\
{% if message.role == 'user' %}[INST] \
{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}{{ message.content }}[/INST]{% endif %}\
{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}{% endif %}\
{% endfor %}"""

BUILT_IN = {
    "plain": _PLAIN,
    "question_answer": _QUESTION_ANSWER,
    "alpaca": _ALPACA,
    "llama2": _LLAMA2,
    "chatml": _CHATML,
    "vicuna": _VICUNA,
    "llama3": _LLAMA3,
    "gemma": _GEMMA,
    "phi3": _PHI3,
    "mistral": _MISTRAL,
}
TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}
"""Tokens that a template needs; the last one ends turns. The other templates end them with EOS."""
# What `auto` selects for a tokenizer without a chat template.
USUAL = {
    "text": "plain", "prompt_completion": "plain", "question_answer": "question_answer",
    "instruction": "alpaca", "messages": "chatml",
    **dict.fromkeys(("preference", "unpaired", "choices", "steps", "prompt"), "question_answer"),
}  # fmt: skip
