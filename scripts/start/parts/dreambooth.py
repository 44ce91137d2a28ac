"""The class prompt of a DreamBooth training that names none: what its captions say, without the word that is trained."""

from __future__ import annotations

from collections import Counter

# words that nothing is called, which people give to what they train
RARE_WORDS = {"sks", "ohwx", "zwx", "zkz", "tok", "szn", "aqr", "rare_token"}


def without_trigger(caption: str, trigger: str | None) -> str | None:
    """A caption without its trigger word, "a photo of sks dog" -> "a photo of dog"; None if it has none to leave out."""
    rare = {word.lower() for word in trigger.split()} if trigger else RARE_WORDS
    words = caption.split()
    kept = [word for word in words if word.strip(",.;:").lower() not in rare]
    rest = " ".join(kept).strip(" ,.;:")
    if not rest or (len(kept) == len(words) and not trigger):
        return None
    return rest


def class_prompt(instance_prompt: str | None, captions: list[str], trigger: str | None) -> str | None:
    """The class prompt that an instance prompt, or else the most usual caption, makes without the trigger word."""
    sources = [instance_prompt] if instance_prompt else captions
    found = Counter(filter(None, (without_trigger(caption, trigger) for caption in sources)))
    most = max(found.values(), default=0)
    return min((prompt for prompt, times in found.items() if times == most), key=len, default=None)
