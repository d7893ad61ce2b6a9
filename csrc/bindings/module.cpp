// The Python module blockhess_ext._C: build information and the tiles of a layout. Importing it registers the tensor
// ops.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "ops/common.h"

namespace py = pybind11;

namespace {

// Returns tiles, (n_tiles, 3) with rows (block, start, stop), and tile_offsets, (n_blocks + 1); see ops/common.h.
py::tuple plan_tiles(const std::vector<int64_t>& dims) {
  std::vector<int64_t> tiles, tile_offsets{0};
  int64_t offset = 0;
  for (size_t block = 0; block < dims.size(); ++block) {
    for (int64_t start = 0; start < dims[block]; start += blockhess::kTileLength) {
      const int64_t stop = std::min(start + blockhess::kTileLength, dims[block]);
      tiles.insert(tiles.end(), {int64_t(block), offset + start, offset + stop});
    }
    offset += dims[block];
    tile_offsets.push_back(int64_t(tiles.size()) / 3);
  }
  const py::ssize_t n_tiles = tile_offsets.back();
  return py::make_tuple(py::array_t<int64_t>({n_tiles, py::ssize_t(3)}, tiles.data()),
                        py::array_t<int64_t>(py::ssize_t(tile_offsets.size()), tile_offsets.data()));
}

std::string instruction_set() {
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4 (AVX-512)";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3 (AVX2)";
  return "x86-64";
#else
  return "the compiler's default";
#endif
}

py::object text_or_none(const char* text) { return text[0] ? py::object(py::str(text)) : py::object(py::none()); }

py::dict build_info() {
  py::dict info;
  info["torch"] = BLOCKHESS_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda"] = text_or_none(BLOCKHESS_CUDA_VERSION);
  info["cuda_architectures"] = text_or_none(BLOCKHESS_CUDA_ARCHITECTURES);
  info["instruction_set"] = instruction_set();
  info["tile_length"] = blockhess::kTileLength;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("plan_tiles", &plan_tiles);
  m.def("build_info", &build_info);
}
