"""Record the clips of the demo: a synthetic voice, turned into the int8 features that the wake-word model reads.

`python nearcast/cli/demo/models/wake_word/record.py` needs `espeak-ng` on PATH, scipy and `pymicro-wakeword`. Written:
`clips.npz` with one int8 array [steps, 1, 3, 40] per phrase, one step being 30 ms of 16 kHz audio; and one phrase as it
was spoken, `okay_nabu.wav`.
"""

from __future__ import annotations

import io
import subprocess
import wave
from pathlib import Path

import numpy as np
from pymicro_wakeword import MicroWakeWordFeatures
from scipy.signal import resample_poly

HERE = Path(__file__).parent
SAMPLE_RATE = 16_000
FEATURE_SCALE, FEATURE_ZERO_POINT = 0.101960786, -128
WINDOWS_PER_STEP = 3
CLIPS = {"okay_nabu": ("en-us+m3", "okay nahboo"), "hey_jarvis": ("en-us+f3", "hey jarvis")}


def speak(voice: str, text: str) -> np.ndarray:
    """16 kHz mono int16 samples with half a second of silence on both sides."""
    out = subprocess.run(["espeak-ng", "-v", voice, "--stdout", text], check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(out)) as file:
        samples = np.frombuffer(file.readframes(10**7), np.int16).astype(np.float32)
        rate = file.getframerate()
    samples = resample_poly(samples, SAMPLE_RATE // 50, rate // 50)
    silence = np.zeros(SAMPLE_RATE // 2, np.float32)
    return np.concatenate([silence, samples, silence]).clip(-32768, 32767).astype(np.int16)


def extract_features(samples: np.ndarray) -> np.ndarray:
    """Int8 features [steps, 1, 3, 40], quantised the way the model declares its input."""
    windows = list(MicroWakeWordFeatures().process_streaming(samples.tobytes()))
    count = len(windows) // WINDOWS_PER_STEP * WINDOWS_PER_STEP
    features = np.concatenate(windows[:count], axis=1).reshape(-1, 1, WINDOWS_PER_STEP, 40)
    return np.round(features / FEATURE_SCALE + FEATURE_ZERO_POINT).clip(-128, 127).astype(np.int8)


def main() -> None:
    """Speak, extract, write."""
    spoken = {name: speak(voice, text) for name, (voice, text) in CLIPS.items()}
    with wave.open(str(HERE / "okay_nabu.wav"), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(spoken["okay_nabu"].tobytes())
    clips = {name: extract_features(samples) for name, samples in spoken.items()}
    for name, clip in clips.items():
        print(f"{name}: {len(clip)} steps of 30 ms")
    np.savez_compressed(HERE / "clips.npz", **clips)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
