"""Length limits against a model's context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alignment.errors import ArgumentsError

if TYPE_CHECKING:
    from alignment.arguments.stage_arguments import Arguments


def fit(args: Arguments, context: int, where: str) -> list[str]:
    """Lower the limits that were not given until a row fits into ``context`` tokens.

    Args:
        args: resolved arguments; changed in place.
        context: positions of the model, in tokens.
        where: the model's name in messages.

    Returns:
        what was changed, in words.

    Raises:
        ArgumentsError: the given limits do not fit.
    """
    if args.context_needed <= context:
        return []
    return _fit_rollout(args, context, where) if hasattr(args, "max_dec_len") else _fit_row(args, context, where)


def _fit_row(args: Arguments, context: int, where: str) -> list[str]:
    """Given rows: ``max_length`` bounds the whole row, a prompt limit a part of it."""
    prompt_key = "src_length" if hasattr(args, "src_length") else "max_src_len"
    prompt_limit = getattr(args, prompt_key)
    if "max_length" in args.given:
        raise ArgumentsError(
            f"max_length is {args.max_length} tokens, but {where} has a context of {context}: set max_length to "
            f"{context} or less" + (f" and {prompt_key} below it" if prompt_limit and prompt_limit >= context else "")
        )
    notes = [f"max_length is {context} tokens, the context of {where}"]
    if prompt_limit is not None and prompt_limit >= context:
        if prompt_key in args.given:
            raise ArgumentsError(
                f"{prompt_key} is {prompt_limit} tokens, but {where} has a context of {context}: no token is left for "
                f"the answer; set {prompt_key} below {context}"
            )
        setattr(args, prompt_key, context // 2)
        notes.append(f"{prompt_key} is {context // 2} tokens, half of the context of {where}")
    args.max_length = context
    return notes


def _fit_rollout(args: Arguments, context: int, where: str) -> list[str]:
    """Methods that generate: prompt (at most ``max_src_len`` tokens) and answer (``max_dec_len``) stand in one row."""
    total = f"max_src_len {args.max_src_len} + max_dec_len {args.max_dec_len} = {args.context_needed} tokens"
    error = (
        f"{total}, but {where} has a context of {context}: "
        f"set max_src_len and max_dec_len so that their sum is at most {context}"
    )
    source_given, answer_given = "max_src_len" in args.given, "max_dec_len" in args.given
    if source_given and answer_given:
        raise ArgumentsError(error)
    if source_given:
        source, answer = args.max_src_len, context - args.max_src_len
    elif answer_given or "max_length" in args.given:
        source, answer = context - args.max_dec_len, args.max_dec_len
    else:
        answer = max(context // 2, args.min_dec_len)
        source = context - answer
    if source < 1 or answer < max(1, args.min_dec_len):
        raise ArgumentsError(error)
    args.max_src_len, args.max_dec_len = source, answer
    return [f"{total}: more than the context of {where} ({context}); now max_src_len {source} + max_dec_len {answer}"]
