"""A tokenizer that reads any text, and chat templates in the manner of three families of models.

The templates are written for these tests. Each follows its family in what matters here: where
tools stand, how a call and its result are written, whether the template writes BOS, what it
refuses, and which further argument it reads.
"""

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{%- if tools %}<|im_start|>system\n"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}Tools:"
    "{%- for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{%- elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}"
    "<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{% if m.role == 'user' or m.role == 'tool' or (m.role == 'assistant'"
    " and not m.tool_calls) %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{%- elif m.role == 'assistant' %}<|im_start|>assistant"
    "{%- if m.content %}\n{{ m.content }}{% endif %}"
    "{%- for call in m.tool_calls %}\n<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)
HEADERS = (
    "{{ bos_token }}"
    "{%- if tools is not none and tools is defined %}<|start|>system<|end|>Date: "
    "{{ date_string | default('26 Jul 2024') }}"
    "{%- for tool in tools %}\n{{ tool | tojson(indent=2) }}{% endfor %}<|eot|>{% endif %}"
    "{%- for m in messages %}{% if 'tool_calls' in m %}"
    "{%- if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{%- set call = m.tool_calls[0].function %}<|start|>assistant<|end|>"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot|>'
    "{%- elif m.role == 'tool' %}<|start|>ipython<|end|>{{ m.content | tojson }}<|eot|>"
    "{%- else %}<|start|>{{ m.role }}<|end|>{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)
BRACKETS = (
    "{%- if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% set ns = namespace(user=0) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.user = ns.user + 1 %}"
    "{%- if loop.first and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST]{{ m.content }}[/INST]"
    "{%- elif m.tool_calls is defined and m.tool_calls is not none %}[TOOL_CALLS]["
    "{%- for call in m.tool_calls %}{{ call.function | tojson }}"
    "{%- if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}"
    "{% endif %}{% endfor %}]{{ eos_token }}"
    "{%- elif m.role == 'tool' %}[TOOL_RESULTS]"
    "{{ {'content': m.content, 'call_id': m.tool_call_id, 'name': m.name} | tojson }}"
    "[/TOOL_RESULTS]"
    "{%- elif m.role == 'assistant' %}{% if m.content is not none %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endif %}{% endfor %}"
)
FAMILIES = {"chatml": CHATML, "headers": HEADERS, "brackets": BRACKETS}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL: dict[str, Any] = {
    "id": "abc123def",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich"}},
}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": "Rain?"}],
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": False, "date_string": "1 Jan"},
    },
    {
        "messages": [
            {"role": "user", "content": "Rain in Zürich?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "abc123def", "content": "12 °C"},
        ],
        "tools": TOOLS,
        "answer": "no",
    },
    {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "And now?"},
        ],
        "answer": "yes",
    },
]


def byte_tokenizer(template: Any = None, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, `<s>`, `</s>`, and two words that are special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<s>", "</s>", "<think>", "</think>", *alphabet]
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(vocabulary)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = token_decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<think>", "</think>"],
    )
    made.chat_template = template
    return made
