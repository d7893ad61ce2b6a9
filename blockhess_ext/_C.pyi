from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

def plan_tiles(dims: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
def build_info() -> dict[str, str | int | None]: ...
