"""Talk to a policy, side by side with the SFT model, scores shown: `python -m pipelines.chat --run tiny --stage ppo`.

One prompt per line, from the terminal or a pipe. `/again` draws other answers, `/new` begins another conversation,
`/quit` or Ctrl-D ends.
"""

import argparse
import io
import logging
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cli import BAD_INPUT, Parser, fail, setup_logging
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.evaluation.chat import Answer, Chat


def show(answers: "list[Answer]") -> str:
    """The answers one below the other, each with its scores."""
    width = shutil.get_terminal_size().columns
    lines = []
    for answer in answers:
        scores = "  ".join(f"{name} {value:.2f}" for name, value in answer.scores.items())
        ended = "" if answer.ended else ", cut"
        lines.append(f"{answer.policy}  [{scores}  KL {answer.kl:.1f}  {answer.tokens} tokens{ended}]")
        for paragraph in answer.text.splitlines() or [""]:
            lines += textwrap.wrap(paragraph, max(20, width - 4), initial_indent="  ", subsequent_indent="  ") or [""]
    return "\n".join(lines)


def respond(chat: "Chat", line: str) -> str | None:
    """What is printed for a line that was typed; None ends the conversation."""
    command = line.strip()
    if command == "/quit":
        return None
    if not command:
        return ""
    try:
        if command == "/new":
            chat.forget()
            return "a new conversation"
        if command.startswith("/") and command != "/again":
            return f"no command {command}: /again, /new, /quit"
        return show(chat.again() if command == "/again" else chat.ask(line.rstrip("\n")))
    except UserError as error:
        return f"error: {error}"


def main(argv: list[str] | None = None) -> int:
    """Read, answer, until the input ends; exit code 2 where there is no such run."""
    setup_logging()
    logging.getLogger("rlhf").setLevel(logging.WARNING)
    parser = Parser(
        prog="python -m pipelines.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="tiny", metavar="NAME", help="folder of the run (tiny)")
    parser.add_argument("--stage", default="ppo", metavar="NAME", help="whose policy speaks beside sft (ppo)")
    parser.add_argument("--artifacts", default="artifacts", metavar="DIR", help="artifact directory (artifacts)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as evaluate.temperature=0.7")
    try:
        args = parser.parse_intermixed_args(argv)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from rlhf.evaluation.chat import Chat, chat_context  # torch only after the arguments have been read

        chat = Chat(chat_context(Path(args.artifacts), args.run, args.stage, args.overrides))
    except UserError as error:
        return fail(str(error))
    asks, failed = sys.stdin.isatty(), False
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may hold anything
    if asks:
        print("One prompt per line; /again, /new, /quit. Scores of reward models: SFT samples have mean 0, std 1.")
    while True:
        try:
            line = input("> ") if asks else next(sys.stdin)
        except (EOFError, StopIteration, KeyboardInterrupt):
            break
        said = respond(chat, line)
        if said is None:
            break
        failed = failed or said.startswith("error: ")
        if said:
            try:
                print(said, flush=True)
            except BrokenPipeError:  # `| head`: nobody reads on
                sys.stdout = None  # type: ignore[assignment]  # or Python would try once more as it exits
                break
    return BAD_INPUT if failed and not asks else 0


if __name__ == "__main__":
    sys.exit(main())
