"""A conversation whose past stays in the engine's state: each turn feeds only what is new."""
from collections.abc import Callable, Iterator

from minillama.sampling import Sampler


class Conversation:
    """Turns of user and assistant, rendered by the file's own template.

    `text` is the rendered text that the engine has read or written so far; `pending` are ids at its end that were
    generated but not yet fed (the last of a reply that was cut off).
    """

    def __init__(self, engine):
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.messages: list[dict[str, str]] = []
        self.forget()

    def forget(self) -> None:
        """Empty the engine's state; the messages stay, and the next turn feeds them all."""
        self.engine.clear()
        self.text, self.pending = "", []

    def say(self, said: str, count: int, sampler: Sampler,
            watch: Callable[[Iterator[int], int], Iterator[int]]) -> Iterator[str]:
        """Yield the reply to `said`, of at most `count` tokens, as text; `watch(ids, fed)` may time the ids.

        Raises ContextError where the conversation no longer fits; it then stands as it was before.
        """
        messages = [*self.messages, {"role": "user", "content": said}]
        whole = self.tokenizer.render_chat(messages)
        if not whole.startswith(self.text):     # a template may rewrite the past, by trimming for example
            self.forget()
        ids = self.pending + self.tokenizer.encode(whole[len(self.text):])
        before, replied = self.engine.position + len(ids), []

        def until_stop() -> Iterator[int]:
            for token in watch(self.engine.generate(ids, count, sampler), len(ids)):
                if token in self.tokenizer.stops:
                    return
                replied.append(token)
                yield token
        yield from self.tokenizer.decode_stream(until_stop())
        reply = self.tokenizer.decode(replied)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        self.text, self.pending = whole + reply, replied[self.engine.position - before:]
