"""What is said of prompts that text encoders read in part."""

from cachec.runtime.errors import shortened


def words_of_loss(prompt: str, lost: str, length: int, *, pooled: bool) -> str:
    """What to say of a prompt that is cut at ``length`` tokens."""
    if pooled:
        return f"prompt {shortened(prompt)}: the pooled text encoder reads {length} tokens only, not {shortened(lost, 200)}"
    return (
        f"prompt {shortened(prompt)} is cut at {length} text tokens, without {shortened(lost, 200)}: shorten it, or compile "
        "with more --text-tokens"
    )
