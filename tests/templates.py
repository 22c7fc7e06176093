"""Chat templates of model families over a small tokenizer that knows their control tokens.

Each template renders what its family's published one renders for messages of text (Qwen2.5, Qwen3,
Llama 3.2, SmolLM2, Gemma 2, Gemma 3); tools and images are left out. ``test_real_templates.py``
holds real tokenizers to the same laws.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiny_policy import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from querl.rollout.chat import ChatFormat

_MESSAGES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
_ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = _MESSAGES + _ANSWER


def with_default_system(text: str) -> str:
    """ChatML that brings a system message where there is none."""
    default = f"<|im_start|>system\n{text}<|im_end|>\n"
    return f"{{% if messages[0].role != 'system' %}}{default}{{% endif %}}" + CHATML


QWEN25 = with_default_system("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
SMOLLM2 = with_default_system(
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
)
QWEN3 = (  # thoughts stay only after the last question; the last answer always shows one
    "{% set ns = namespace(asked=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set ns.thought = '' %}{% set ns.said = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set ns.thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set ns.said = m.content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.asked and (loop.last or ns.thought) %}"
    "{% set ns.said = '<think>\n' + ns.thought + '\n</think>\n\n' + ns.said.lstrip('\n') %}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ ns.said }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
THINKING = QWEN3.replace(  # as Qwen3's thinking-only models: the prompt opens the thought
    "<|im_start|>assistant\n{% if", "<|im_start|>assistant\n<think>\n{% if"
)
LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages if m.role != 'system' %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA_MESSAGES = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ opening if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% set turns = messages %}{% set opening = '' %}" + _GEMMA_MESSAGES
)
GEMMA3 = (
    "{{ bos_token }}{% set is_led = messages[0].role == 'system' %}"
    "{% set turns = messages[1:] if is_led else messages %}"
    "{% set opening = messages[0].content + '\n\n' if is_led else '' %}" + _GEMMA_MESSAGES
)
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
_GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>", "<eos>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A template (None: a base model), its control tokens, the token before every text."""

    template: str | None
    control: tuple[str, ...] = _CHATML_TOKENS
    end: str = "<|im_end|>"
    bos: str | None = None
    rewrites: bool = False  # whether it drops earlier thoughts

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A small byte-level tokenizer for the family."""
        made = tiny_tokenizer()
        made.add_special_tokens({"additional_special_tokens": list(self.control)})
        made.chat_template = self.template
        made.eos_token = self.end
        if self.bos is not None:
            made.add_special_tokens({"bos_token": self.bos})
            made.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, made.bos_token_id)]
            )
        return made

    def chat(self) -> ChatFormat:
        """The family's format, plain where it has no template."""
        return ChatFormat(self.tokenizer())


FAMILIES = {
    "qwen2.5": Family(template=QWEN25),
    "qwen3": Family(template=QWEN3, rewrites=True),
    "qwen3-thinking": Family(template=THINKING, rewrites=True),
    "llama-3": Family(
        template=LLAMA3, control=_LLAMA_TOKENS, end="<|eot_id|>", bos="<|begin_of_text|>"
    ),
    "smollm2": Family(template=SMOLLM2),
    "gemma-2": Family(template=GEMMA2, control=_GEMMA_TOKENS, end="<end_of_turn>", bos="<bos>"),
    "gemma-3": Family(template=GEMMA3, control=_GEMMA_TOKENS, end="<end_of_turn>", bos="<bos>"),
    "plain": Family(template=None, control=("<|endoftext|>",), end="<|endoftext|>"),
    "plain-bos": Family(
        template=None, control=_LLAMA_TOKENS, end="<|end_of_text|>", bos="<|begin_of_text|>"
    ),
}
