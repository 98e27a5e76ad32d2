"""Chat templates of model families, described by what they write around each message."""

from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

import tiny

THINK = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Family:
    """A template as text around messages. `{}` is the content."""

    special: str
    """Special tokens, separated by spaces."""
    eos: str
    user: str
    assistant: str
    prompt: str
    """What a generation prompt adds."""
    stop: str
    """Stop token of an assistant turn."""
    system: str | None = None
    """None if there are no system messages."""
    begin: str = ""
    default_system: str = ""
    """Written if the chat has no system message."""
    last: str | None = None
    """An assistant turn at the end of the chat, if it differs."""
    end: str = ""
    """Written after a finished chat."""
    before: str = ""
    """What an earlier turn generates before its content, after the prompt."""
    before_last: str | None = None
    last_stop: str | None = None
    content: str = "m['content']"
    """Jinja expression of the content."""
    plain: str = ""
    """Added tokens that are not special."""

    def source(self) -> str:
        """Return the template in Jinja."""
        turns = {"user": self.user, "assistant": self.assistant}
        if self.system is not None:
            turns["system"] = self.system
        parts = [self.begin]
        if self.default_system:
            parts.append(
                "{% if messages[0]['role'] != 'system' %}" + self.default_system + "{% endif %}"
            )
        parts.append("{% for m in messages %}")
        for number, (role, text) in enumerate(turns.items()):
            parts.append(f"{{% {'elif' if number else 'if'} m['role'] == '{role}' %}}")
            if role == "assistant" and self.last is not None:
                parts += ["{% if loop.last %}", self.last, "{% else %}", text, "{% endif %}"]
            else:
                parts.append(text)
        parts.append("{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}")
        parts.append("{% if add_generation_prompt %}" + self.prompt + "{% else %}")
        parts.append(self.end + "{% endif %}")
        return "".join(parts).replace("{}", "{{ " + self.content + " }}")

    @lru_cache  # noqa: B019
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with the special tokens and the template."""
        backend = Tokenizer.from_str(tiny.tiny_tokenizer(300).backend_tokenizer.to_str())
        backend.add_special_tokens(
            [AddedToken(t, special=True, normalized=False) for t in self.special.split()]
        )
        backend.add_tokens(
            [AddedToken(t, special=False, normalized=False) for t in self.plain.split()]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=self.eos)
        tokenizer.chat_template = self.source()
        return tokenizer

    def turn(self, content: str, *, is_last: bool) -> str:
        """Return the targets of a turn."""
        if ".strip" in self.content or "trim" in self.content:
            content = content.strip()
        before = self.before_last if is_last and self.before_last is not None else self.before
        stop = self.last_stop if is_last and self.last_stop is not None else self.stop
        return before + content + stop


def chatml(**more: str) -> Family:
    """ChatML, with changes."""
    fields = {
        "special": "<|endoftext|> <|im_start|> <|im_end|>",
        "eos": "<|im_end|>",
        "system": "<|im_start|>system\n{}<|im_end|>\n",
        "user": "<|im_start|>user\n{}<|im_end|>\n",
        "assistant": "<|im_start|>assistant\n{}<|im_end|>\n",
        "prompt": "<|im_start|>assistant\n",
        "stop": "<|im_end|>",
    }
    return Family(**(fields | more))  # type: ignore[arg-type]


def llama3(**more: str) -> Family:
    """Llama 3, with changes."""
    head = "<|start_header_id|>%s<|end_header_id|>\n\n"
    fields = {
        "special": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "eos": "<|eot_id|>",
        "begin": "<|begin_of_text|>",
        "system": head % "system" + "{}<|eot_id|>",
        "user": head % "user" + "{}<|eot_id|>",
        "assistant": head % "assistant" + "{}<|eot_id|>",
        "prompt": head % "assistant",
        "stop": "<|eot_id|>",
        "content": "m['content'] | trim",
    }
    return Family(**(fields | more))  # type: ignore[arg-type]


FAMILIES = {
    "ChatML": chatml(),
    "Qwen2.5": chatml(default_system="<|im_start|>system\nYou are helpful.<|im_end|>\n"),
    "Qwen3": chatml(
        last="<|im_start|>assistant\n" + THINK + "{}<|im_end|>\n",
        before_last=THINK,
        plain="<think> </think>",
    ),
    "Qwen3.5": chatml(
        last="<|im_start|>assistant\n" + THINK + "{}<|im_end|>\n",
        prompt="<|im_start|>assistant\n<think>\n",
        before_last="\n</think>\n\n",
        plain="<think> </think>",
        content="m['content'] | trim",
    ),
    "base with eos elsewhere": chatml(eos="<|endoftext|>"),
    "SmolLM2": chatml(
        default_system="<|im_start|>system\nYou are SmolLM.<|im_end|>\n", eos="<|im_end|>"
    ),
    "SmolLM3": chatml(
        begin="<|im_start|>system\nToday: {{ strftime_now('%d %B %Y') }}\n<|im_end|>\n"
    ),
    "LFM2": chatml(special="<|startoftext|> <|im_start|> <|im_end|>", begin="<|startoftext|>"),
    "Yi": chatml(special="<unk> <|startoftext|> <|im_start|> <|im_end|>"),
    "InternLM2": chatml(special="<s> </s> <|im_start|> <|im_end|>", eos="</s>", begin="<s>"),
    "Llama 3": llama3(),
    "Llama 3.2": llama3(
        begin="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today Date: {{ strftime_now('%d %b %Y') }}\n\n<|eot_id|>"
    ),
    "Llama 2": Family(
        special="<unk> <s> </s>",
        eos="</s>",
        user="<s>[INST] {} [/INST]",
        assistant=" {} </s>",
        prompt="",
        stop=" </s>",
        content="m['content'] | trim",
    ),
    "Mistral": Family(
        special="<unk> <s> </s> [INST] [/INST]",
        eos="</s>",
        begin="<s>",
        user="[INST] {}[/INST]",
        assistant=" {}</s>",
        prompt="",
        stop="</s>",
    ),
    "Mistral 7": Family(
        special="<unk> <s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
        eos="</s>",
        begin="<s>",
        system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",
        user="[INST]{}[/INST]",
        assistant="{}</s>",
        prompt="",
        stop="</s>",
    ),
    "Gemma": Family(
        special="<bos> <eos> <start_of_turn> <end_of_turn>",
        eos="<eos>",
        begin="<bos>",
        user="<start_of_turn>user\n{}<end_of_turn>\n",
        assistant="<start_of_turn>model\n{}<end_of_turn>\n",
        prompt="<start_of_turn>model\n",
        stop="<end_of_turn>",
        content="m['content'] | trim",
    ),
    "Phi-3": Family(
        special="<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
        eos="<|endoftext|>",
        system="<|system|>\n{}<|end|>\n",
        user="<|user|>\n{}<|end|>\n",
        assistant="<|assistant|>\n{}<|end|>\n",
        prompt="<|assistant|>\n",
        end="<|endoftext|>",
        stop="<|end|>",
    ),
    "Phi-4": Family(
        special="<|im_start|> <|im_sep|> <|im_end|>",
        eos="<|im_end|>",
        system="<|im_start|>system<|im_sep|>{}<|im_end|>",
        user="<|im_start|>user<|im_sep|>{}<|im_end|>",
        assistant="<|im_start|>assistant<|im_sep|>{}<|im_end|>",
        prompt="<|im_start|>assistant<|im_sep|>",
        stop="<|im_end|>",
    ),
    "gpt-oss": Family(
        special="<|start|> <|message|> <|channel|> <|end|> <|return|>",
        eos="<|return|>",
        begin="<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>",
        system="<|start|>developer<|message|># Instructions\n\n{}<|end|>",
        user="<|start|>user<|message|>{}<|end|>",
        assistant="<|start|>assistant<|channel|>final<|message|>{}<|end|>",
        last="<|start|>assistant<|channel|>final<|message|>{}<|return|>",
        prompt="<|start|>assistant",
        before="<|channel|>final<|message|>",
        stop="<|end|>",
        last_stop="<|return|>",
    ),
    "GLM-4": Family(
        special="<|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|>",
        eos="<|endoftext|>",
        begin="[gMASK]<sop>",
        system="<|system|>\n{}",
        user="<|user|>\n{}",
        assistant="<|assistant|>\n{}",
        prompt="<|assistant|>",
        before="\n",
        stop="<|user|>",
        last_stop="<|endoftext|>",
        content="m['content'] | trim",
    ),
    "DeepSeek-V2": Family(
        special="<|begin|> <|eos|>",
        eos="<|eos|>",
        begin="<|begin|>",
        system="{}\n\n",
        user="User: {}\n\n",
        assistant="Assistant: {}<|eos|>",
        prompt="Assistant:",
        before=" ",
        stop="<|eos|>",
    ),
    "DeepSeek-R1": Family(
        special="<|begin|> <|eos|> <|User|> <|Assistant|>",
        eos="<|eos|>",
        begin="<|begin|>",
        system="{}",
        user="<|User|>{}",
        assistant="<|Assistant|>{}<|eos|>",
        prompt="<|Assistant|><think>\n",
        stop="<|eos|>",
        content="m['content'].split('</think>')[-1]",
        plain="<think> </think>",
    ),
    "Command-R": Family(
        special="<BOS> <|START|> <|END|> <|USER|> <|CHATBOT|> <|SYSTEM|>",
        eos="<|END|>",
        begin="<BOS>",
        system="<|START|><|SYSTEM|>{}<|END|>",
        user="<|START|><|USER|>{}<|END|>",
        assistant="<|START|><|CHATBOT|>{}<|END|>",
        prompt="<|START|><|CHATBOT|>",
        stop="<|END|>",
    ),
    "Command-R7B": Family(
        special="<|START|> <|END|> <|USER|> <|CHATBOT|> <|START_RESPONSE|> <|END_RESPONSE|>",
        eos="<|END|>",
        user="<|START|><|USER|>{}<|END|>",
        assistant="<|START|><|CHATBOT|><|START_RESPONSE|>{}<|END_RESPONSE|><|END|>",
        prompt="<|START|><|CHATBOT|>",
        before="<|START_RESPONSE|>",
        stop="<|END_RESPONSE|><|END|>",
    ),
    "Zephyr": Family(
        special="<unk> <s> </s>",
        eos="</s>",
        system="<|system|>\n{}</s>\n",
        user="<|user|>\n{}</s>\n",
        assistant="<|assistant|>\n{}</s>\n",
        prompt="<|assistant|>\n",
        stop="</s>",
    ),
    "Vicuna": Family(
        special="<unk> <s> </s>",
        eos="</s>",
        begin="<s>",
        system="{} ",
        user="USER: {} ",
        assistant="ASSISTANT: {}</s>",
        prompt="ASSISTANT:",
        before=" ",
        stop="</s>",
    ),
    "OLMo 2": Family(
        special="<|endoftext|>",
        eos="<|endoftext|>",
        begin="<|endoftext|>",
        system="<|system|>\n{}\n",
        user="<|user|>\n{}\n",
        assistant="<|assistant|>\n{}<|endoftext|>\n",
        last="<|assistant|>\n{}<|endoftext|>",
        prompt="<|assistant|>\n",
        stop="<|endoftext|>",
    ),
    "Granite": Family(
        special="<|start_of_role|> <|end_of_role|> <|end_of_text|>",
        eos="<|end_of_text|>",
        system="<|start_of_role|>system<|end_of_role|>{}<|end_of_text|>\n",
        user="<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n",
        assistant="<|start_of_role|>assistant<|end_of_role|>{}<|end_of_text|>\n",
        prompt="<|start_of_role|>assistant<|end_of_role|>",
        stop="<|end_of_text|>",
    ),
    "Baichuan": Family(
        special="<s> </s> <reserved_106> <reserved_107>",
        eos="</s>",
        system="{}",
        user="<reserved_106>{}",
        assistant="<reserved_107>{}",
        prompt="<reserved_107>",
        stop="<reserved_106>",
        last_stop="</s>",
    ),
    "Exaone": Family(
        special="[|system|] [|user|] [|assistant|] [|endofturn|]",
        eos="[|endofturn|]",
        default_system="[|system|][|endofturn|]\n",
        system="[|system|]{}[|endofturn|]\n",
        user="[|user|]{}\n",
        assistant="[|assistant|]{}[|endofturn|]\n",
        prompt="[|assistant|]",
        stop="[|endofturn|]",
    ),
    "turn tokens not marked special": chatml(
        special="<|endoftext|>", eos="<|endoftext|>", plain="<|im_start|> <|im_end|>"
    ),
}
