"""The one place where prompts and responses become token ids: every stage sees `prompt_ids + response_ids`.

The two parts are tokenised apart, so no token spans the boundary and a response that the policy sampled is the same ids
that the reward model was trained on (trl#1702: trained on tokenize(p + r), scored on tokenize(p) + tokenize(r)).
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jinja2

from rlhf.errors import UserError

Message = dict[str, str]
Prompt = str | list[Message]
TEXTS = 1000  # given to the tokenizer at a time
PARALLEL = "TOKENIZERS_PARALLELISM"
_home, _one_at_a_time = os.getpid(), threading.Lock()


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Tokenise with every core, here alone: a process that is forked later finds the setting as it was.

    With it left on, the library warns at each fork. In a fork it has to stay off: threads are not copied, and would be
    waited for without end.
    """
    if os.getpid() != _home:
        yield
        return
    with _one_at_a_time:
        before = os.environ.get(PARALLEL)
        os.environ[PARALLEL] = "true"
        try:
            yield
        finally:
            if before is None:
                del os.environ[PARALLEL]
            else:
                os.environ[PARALLEL] = before


class Renderer:
    """Renders prompts and responses for one tokenizer.

    A plain prompt (str, `chat` off) is tokenised as `tokenizer(prompt)` does it, BOS included where the tokenizer's
    post-processor adds one. A conversation (a list of messages, or a str with `chat` on, which is one user message)
    goes through the tokenizer's chat template.
    """

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        """Binds the renderer to a tokenizer.

        Args:
            tokenizer: a transformers tokenizer with an EOS token.
            chat: whether str prompts are rendered as a user message of the chat template.

        Raises:
            UserError: no EOS token, a post-processor that appends tokens, or `chat` without a chat template.
        """
        self.tokenizer = tokenizer
        self.chat = chat
        self._name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {self._name}: no eos_token, so a response could never end; set one")
        if chat and not tokenizer.chat_template:
            raise UserError(
                f"tokenizer {self._name}: chat is on, but it has no chat template; set one or turn chat off"
            )
        [plain], [full] = self._encode(["a"], special=False), self._encode(["a"], special=True)
        if full[len(full) - len(plain) :] != plain:
            ending = tokenizer.convert_ids_to_tokens(full[-1])
            raise UserError(
                f"tokenizer {self._name}: its post-processor appends {ending!r} to every text, so prompts would end "
                "there; set add_eos_token=False or remove it from the post-processor"
            )

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids [P] of a prompt, up to where the response begins; see `all_prompt_ids`."""
        return self.all_prompt_ids([prompt])[0]

    def response_ids(self, prompt: Prompt, response: str) -> list[int]:
        """Token ids [R] of a response; see `all_response_ids`."""
        return self.all_response_ids([prompt], [response])[0]

    def all_prompt_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids [P] of each prompt, up to where the response begins, tokenised together.

        Raises:
            UserError: messages without a chat template, or messages that the template refuses.
        """
        conversations = [self._as_messages(prompt) for prompt in prompts]
        plain = iter(self._encode([p for p, c in zip(prompts, conversations, strict=True) if c is None], special=True))
        # The template writes its own special tokens, BOS among them.
        texts = [self._render(messages, generation_prompt=True) for messages in conversations if messages is not None]
        chat = iter(self._encode(texts, special=False))
        return [next(plain if messages is None else chat) for messages in conversations]

    def all_response_ids(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[list[int]]:
        """Token ids [R] of the response to each prompt, with exactly one EOS, at the end; tokenised together.

        For conversations it is what the chat template writes after the rendered prompt, cut behind the first EOS:
        ChatML's newline after `<|im_end|>` would be the reward model's last token in training, but not in PPO.

        Raises:
            UserError: a template whose full rendering does not begin with the prompt's, or that writes no EOS.
        """
        conversations = [self._as_messages(prompt) for prompt in prompts]
        texts = [self._answer(*pair) for pair in zip(conversations, responses, strict=True)]
        eos, result = self.tokenizer.eos_token_id, []
        for messages, text, ids in zip(conversations, texts, self._encode(texts, special=False), strict=True):
            if eos not in ids and messages is not None:
                raise UserError(
                    f"tokenizer {self._name}: its chat template ends a response with {text[-20:]!r}, which holds no "
                    f"eos_token {self.tokenizer.eos_token!r}; set eos_token to the token that ends a turn"
                )
            result.append([*ids[: ids.index(eos)], eos] if eos in ids else [*ids, eos])
        return result

    def prompt_text(self, prompt: Prompt) -> str:
        """The prompt for people and reward functions: a str as it is, a lone user message's text, else a transcript."""
        if isinstance(prompt, str):
            return prompt
        if len(prompt) == 1 and prompt[0]["role"] == "user":
            return prompt[0]["content"]
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)

    def decode_response(self, ids: list[int]) -> str:
        """The text of response ids, without special tokens and without anything after the first EOS."""
        ids = [int(token) for token in ids]
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _as_messages(self, prompt: Prompt) -> list[Message] | None:
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}] if self.chat else None
        if not self.tokenizer.chat_template:
            raise UserError(
                f"tokenizer {self._name}: the prompt is a conversation of {len(prompt)} messages, but there is no chat "
                "template; use a model that has one, or data with plain prompts"
            )
        return prompt

    def _answer(self, messages: list[Message] | None, response: str) -> str:
        """What is behind the prompt: the response, in a conversation as the chat template writes it."""
        if messages is None:
            return response
        before = self._render(messages, generation_prompt=True)
        full = self._render([*messages, {"role": "assistant", "content": response}], generation_prompt=False)
        if not full.startswith(before):
            raise UserError(
                f"tokenizer {self._name}: its chat template renders the answered conversation {full[:50]!r}... without "
                f"the rendered prompt {before[:50]!r}... in front; fix the template, it must only append"
            )
        return full[len(before) :]

    def _encode(self, texts: Sequence[Any], special: bool) -> list[list[int]]:
        ids: list[list[int]] = []
        with on_all_cores() if len(texts) > 1 else nullcontext():
            for start in range(0, len(texts), TEXTS):
                # verbose=False: length limits are checked by the stages, with the recipe's keys in the message.
                some = list(texts[start : start + TEXTS])
                ids += self.tokenizer(some, add_special_tokens=special, verbose=False).input_ids
        return [list(row) for row in ids]

    def _render(self, messages: list[Message], generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, tokenize=False)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"tokenizer {self._name}: its chat template refuses the roles {roles} ({' '.join(str(error).split())})"
            ) from error
