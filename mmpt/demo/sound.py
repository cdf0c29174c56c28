"""Sound that is heard while it is made: chunks that the browser plays without a gap."""

import base64

import gradio as gr
import numpy as np

from mmpt.demo.conversation import Turn

SCRIPT = "watch('value', () => window.mmpt.hear(props.value));"


def lay_out_player() -> gr.HTML:
    """What plays the values of `heard`."""
    return gr.HTML(value=None, html_template="", js_on_load=SCRIPT, elem_id="player")


class Heard:
    """The chunks of one turn: a value grows, so that only what is new is sent."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self._chunks: list[str] = []
        self._part = (-1, -1)

    def push(self, wave: np.ndarray, sample_rate: int) -> dict[str, object]:
        """float32 (n,) -> the value with this chunk behind the others of its part."""
        answer = self.turn.answers[-1]
        part = (len(self.turn.answers), len(answer.parts))
        if part != self._part:
            self._part, self._chunks = part, []
        samples = np.round(wave.clip(-1, 1) * 32_767).astype("<i2")
        self._chunks.append(base64.b64encode(samples.tobytes()).decode())
        name = f"{self.turn.number}.{part[0]}.{part[1]}"
        return {"name": name, "rate": sample_rate, "chunks": list(self._chunks)}
