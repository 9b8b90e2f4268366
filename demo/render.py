"""The training text of a conversation, equal to what chat_template.jinja makes of it; knows no task."""

from __future__ import annotations

from demo.split import Conversation, Message

ROLE_END = "<|role_end|>"
THINK_CLOSE = "\n</think>\n\n"
ROLES = {"system": "SYSTEM", "user": "HUMAN", "assistant": "ASSISTANT"}


def role(name: str) -> str:
    """Return the header of a role."""
    return f"<role>{name}</role>"


def as_dicts(conversation: Conversation) -> list[dict[str, str]]:
    """Return the messages in the form that chat templates take."""
    return [
        {"role": m.role, "content": m.content, **({"reasoning_content": m.thinking} if m.thinking else {})}
        for m in conversation.messages
    ]


def render(conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """Render the whole conversation, with the thinking of the last assistant turn only.

    The loss covers that turn: older turns are shown without thinking, and to predict them would teach the model to
    answer without it. An empty thinking block belongs to the prompt, as the template writes it for
    ``enable_thinking=false``, so the loss then starts after it.

    Returns:
        The text, and the character spans (start, end) in which tokens are to be predicted.
    """
    *earlier, last = conversation.messages
    parts = [_message(message) for message in earlier]
    parts.append(role("ASSISTANT"))
    if not last.thinking:
        parts.append(f"<think>\n{THINK_CLOSE}")
    prompt = "".join(parts)
    block = f"<think>\n{last.thinking}{THINK_CLOSE}" if last.thinking else ""
    text = f"{prompt}{block}{last.content}{ROLE_END}"
    return text, [(len(prompt), len(text))]


def render_thinking_from(conversation: Conversation, first: int) -> tuple[str, list[tuple[int, int]]]:
    """Render with the thinking of every assistant turn from message ``first`` on, and the loss on each of them.

    This is no form that a template makes; it trains several answers about one long text at the price of one reading.

    Returns:
        The text, and the character spans in which tokens are to be predicted.
    """
    text, spans = "".join(_message(m) for m in conversation.messages[:first]), []
    for message in conversation.messages[first:]:
        if message.role != "assistant":
            text += _message(message)
            continue
        text += role("ASSISTANT")
        start = len(text)
        text += f"<think>\n{message.thinking}{THINK_CLOSE}{message.content}{ROLE_END}"
        spans.append((start, len(text)))
    return text, spans


def _message(message: Message) -> str:
    return f"{role(ROLES[message.role])}{message.content}{ROLE_END}"
