"""`certjax generate`: text and a certificate summary."""

from __future__ import annotations

import sys

import click
import jax
from rich.console import Console
from rich.table import Table

from certjax.cli.common import clean_errors, json_option, kv_dtype_option, print_json, use_compilation_cache
from certjax.codecs import REGISTRY
from certjax.errors import InvalidArgumentError
from certjax.generate import generate
from certjax.model import load
from certjax.plugs import MODES
from certjax.policy import Policy


@click.command("generate")
@click.option("--model", "name", default="smollm2", show_default=True, help="'smollm2' or a converted directory.")
@click.option("--prompt", "prompts", multiple=True, required=True, help="A prompt; '-' is stdin. Repeat for a batch.")
@click.option("--mode", type=click.Choice(MODES), default="certified", show_default=True)
@click.option(
    "--policy", "policy_name", type=click.Choice(["budget", "paper", "observe"]), default="budget", show_default=True
)
@click.option("--tolerance", type=float, default=None, help="Budget policy: certified error allowed.  [default: 0.05]")
@click.option(
    "--relative-to", type=click.Choice(["layer", "head", "absolute"]), default=None,
    help="What the tolerance is relative to.  [default: layer]",
)  # fmt: skip
@click.option(
    "--codec", type=click.Choice(sorted(REGISTRY)), default=None,
    help="Tier-1 format.  [default: planes, with --policy paper int8_int4]",
)  # fmt: skip
@click.option(
    "--block-size", type=int, default=None, help="Tokens of a block; kernels on a GPU read 128.  [default: 16]"
)
@kv_dtype_option
@click.option("--max-new-tokens", type=int, default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, help="0 keeps all tokens.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--chat/--no-chat", default=None, help="Use the chat template.  [default: if the model has one]")
@json_option
def generate_command(
    name, prompts, mode, policy_name, tolerance, relative_to, codec, block_size, kv_dtype, max_new_tokens, temperature,
    top_k, top_p, seed, chat, as_json,
) -> None:  # fmt: skip
    """Generate text and print what the certificates say."""
    use_compilation_cache()
    with clean_errors():
        given = click.get_current_context().get_parameter_source("policy_name").name != "DEFAULT"
        if mode == "dense" and (given or {tolerance, relative_to, codec, block_size} != {None}):
            raise InvalidArgumentError(
                "--mode dense compresses and certifies nothing: leave out --policy, --tolerance, --relative-to, "
                "--codec and --block-size, or choose another mode."
            )
        policy = _policy(policy_name, tolerance, relative_to, codec=codec, block_size=block_size)
        prompts = [sys.stdin.read() if p == "-" else p for p in prompts]
        model = load(name, kv_dtype=kv_dtype, progress=not as_json)
        chat = model.tokenizer.has_chat_template if chat is None and model.tokenizer else bool(chat)
        result = generate(
            model, prompts, max_new_tokens=max_new_tokens, mode=mode, policy=policy, key=jax.random.key(seed),
            temperature=temperature, top_k=top_k, top_p=top_p, chat=chat,
        )  # fmt: skip
    report = result.report()
    if as_json:
        print_json({
            "text": result.text,
            "tokens": [t.tolist() for t in result.tokens],
            "device": str(jax.devices()[0]),
            "report": report.to_dict(),
        })  # fmt: skip
        return
    for text in result.text:
        click.echo(text)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for label, value in report.rows():
        table.add_row(label, value)
    console = Console()
    console.rule(style="dim")
    console.print(table)


def _policy(name: str, tolerance: float | None, relative_to: str | None, **fields) -> Policy:
    chosen = {field: x for field, x in fields.items() if x is not None}
    if name == "budget":
        return Policy.budget(0.05 if tolerance is None else tolerance, relative_to or "layer", **chosen)
    if tolerance is not None or relative_to is not None:
        raise InvalidArgumentError("--tolerance and --relative-to belong to --policy budget.")
    return Policy.paper(**chosen) if name == "paper" else Policy.observe(**chosen)
