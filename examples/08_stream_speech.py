"""Speech that can be played before it is finished: each chunk goes into the file as it comes.

Run: python examples/08_stream_speech.py [MODEL]
"""

import sys
import time
from pathlib import Path

import soundfile

import mmpt
from mmpt.results import AudioChunk, PartDone
from mmpt.vocab import Modality

model = mmpt.load(sys.argv[1] if sys.argv[1:] else f"{Path(__file__).parent}/mmpt-mini")
rate = model.processor.media[Modality.SPEECH].sample_rate
out = Path("runs/examples/streamed.wav")
out.parent.mkdir(parents=True, exist_ok=True)

begin = time.perf_counter()
with soundfile.SoundFile(out, "w", samplerate=rate, channels=1) as file:
    for event in model.stream("please enter your number", to="speech", max_seconds=4.0, seed=1):
        if isinstance(event, AudioChunk):
            file.write(event.wave)
            print(f"after {time.perf_counter() - begin:.2f} s: {len(event.wave) / rate:.2f} s")
        elif isinstance(event, PartDone):
            whole = event.part
print(f"{whole.seconds:.2f} s of speech in {out}")
