#include "stored.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

namespace maskserve {

namespace {

// The stored cells from one on whose positions are at least `position`: near ones are found soonest.
int64_t first_from(const Stored& stored, int64_t at, int64_t position) {
  const int64_t* const positions = stored.positions_ptr;
  int64_t stop = at;
  for (int64_t step = 1; stop < stored.n_stored && positions[stop] < position; step *= 2) {
    at = stop + 1;
    stop = std::min(stop + step, stored.n_stored);
  }
  return std::lower_bound(positions + at, positions + std::max(at, stop), position) - positions;
}

// The stored cells from one on whose positions are in [position, position + n), to cells that begin there; the next one.
template <class Cell, bool is_masked>
int64_t spread_line(const Stored& stored, int64_t at, int64_t position, int64_t n, Cell* cells, unsigned char* keep) {
  const Cell* const given = reinterpret_cast<const Cell*>(stored.cells_ptr);
  for (; at < stored.n_stored && stored.positions_ptr[at] < position + n; ++at) {
    const uint64_t place = static_cast<uint64_t>(stored.positions_ptr[at]) - static_cast<uint64_t>(position);
    if (place >= static_cast<uint64_t>(n)) continue;
    cells[place] = given[at];
    keep[place] = is_masked ? stored.mask_ptr[at] : 1;
  }
  return at;
}

template <class Cell>
int64_t spread_line(const Stored& stored, int64_t at, int64_t position, int64_t n, Cell* cells, unsigned char* keep) {
  return stored.mask_ptr ? spread_line<Cell, true>(stored, at, position, n, cells, keep)
                         : spread_line<Cell, false>(stored, at, position, n, cells, keep);
}

// The blocks of a grid in turn, spread out one after the other.
template <class Cell>
class Spread {
 public:
  Spread(const Stored& given, const Grid& cut)
      : stored(given), grid(cut), is_whole(cut.width == cut.inner),
        cells(new Cell[static_cast<size_t>(cut.block_cells())]()),
        keep(new unsigned char[static_cast<size_t>(cut.block_cells())]),
        next(is_whole ? 1 : static_cast<size_t>(cut.run)) {}

  // Rows [o, o + rows), [i, i + n) of them, columns [c, c + columns). What was there of other blocks is masked, and stays.
  void move_to(int64_t o, int64_t rows, int64_t i, int64_t n, int64_t c, int64_t columns) {
    const int64_t position = (o * grid.n + i) * grid.inner + c;
    const int64_t n_lines = is_whole ? 1 : n, length = is_whole ? rows * n * columns : columns;
    std::memset(keep.get(), 0, static_cast<size_t>(n_lines * length));
    for (int64_t line = 0; line < n_lines; ++line) {
      const int64_t start = position + line * grid.inner;
      int64_t& at = next[static_cast<size_t>(line)];
      if (is_first || (!is_whole && c == 0)) at = first_from(stored, line ? next[static_cast<size_t>(line) - 1] : at, start);
      at = spread_line(stored, at, start, length, cells.get() + line * length, keep.get() + line * length);
    }
    is_first = false;
  }

  const unsigned char* cells_ptr() const { return reinterpret_cast<const unsigned char*>(cells.get()); }
  const unsigned char* keep_ptr() const { return keep.get(); }

 private:
  const Stored& stored;
  const Grid& grid;
  const bool is_whole;  // a block's cells lie side by side
  const std::unique_ptr<Cell[]> cells;
  const std::unique_ptr<unsigned char[]> keep;
  std::vector<int64_t> next;  // of each line of cells side by side, the first stored one that was not spread out
  bool is_first = true;
};

template <class Cell>
bool lift_blocks(Lift lift, const Options& options, const Stored& stored, const Grid& grid, const Block& like,
                 int64_t first, int64_t last, const Parts& parts, const int64_t* part_bytes) {
  Spread<Cell> spread(stored, grid);
  const int64_t n_runs = grid.n_runs(), n_tiles = grid.n_tiles();
  for (int64_t b = first; b < last; ++b) {
    const int64_t c = b % n_tiles * grid.width, r = b / n_tiles % n_runs, o = b / n_tiles / n_runs * grid.height;
    Block block = like;
    block.outer = std::min(grid.height, grid.outer - o);
    block.n = std::min(grid.run, grid.n - r * grid.run);
    block.inner = std::min(grid.width, grid.inner - c);
    spread.move_to(o, block.outer, r * grid.run, block.n, c, block.inner);
    const Operand cells{spread.cells_ptr(), block.n * block.inner, block.inner, 1};
    block.data = block.mask = cells;
    block.mask.cells_ptr = spread.keep_ptr();
    const int64_t at = (o * n_runs + r) * grid.inner + c;
    Parts own{parts.count_ptr + at, {}};
    for (int k = 0; k < n_parts; ++k) {
      if (parts.part_ptr[k]) own.part_ptr[k] = static_cast<unsigned char*>(parts.part_ptr[k]) + at * part_bytes[1 + k];
    }
    if (!lift(block, options, own)) return false;
  }
  return true;
}

}  // namespace

bool Grid::fits() const {
  constexpr int64_t most = int64_t{1} << 32;  // no product of sizes leaves its range
  if (outer < 1 || n < 1 || inner < 1 || height < 1 || run < 1 || width < 1) return false;
  if (height > outer || run > n || width > inner || run > most / width || height > most / (run * width)) return false;
  return height == 1 || (run == n && width == inner);
}

bool lift_stored(Lift lift, const Options& options, const Stored& stored, const Grid& grid, const Block& like,
                 int64_t first, int64_t last, const Parts& parts, const int64_t* part_bytes) {
  switch (cell_bytes(like.dtype)) {
    case 1: return lift_blocks<uint8_t>(lift, options, stored, grid, like, first, last, parts, part_bytes);
    case 2: return lift_blocks<uint16_t>(lift, options, stored, grid, like, first, last, parts, part_bytes);
    case 4: return lift_blocks<uint32_t>(lift, options, stored, grid, like, first, last, parts, part_bytes);
    default: return lift_blocks<uint64_t>(lift, options, stored, grid, like, first, last, parts, part_bytes);
  }
}

}  // namespace maskserve
