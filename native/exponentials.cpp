// Sums of exponentials below the largest cell, the states of logsumexp; and softmax and log_softmax.

#include "common.hpp"

namespace maskserve {
namespace MASKSERVE_ISA {
namespace {

#include "tiles.hpp"

#include "tree.hpp"

#include "halving.hpp"

#include "elementary.hpp"

#include "narrow.hpp"

#include "leaf_cells.hpp"

#include "exp_leaves.hpp"

#include "exp_groups.hpp"

#include "softmax.hpp"

// The states of leaves of 64 rows, one after another. False where a cell is inf: another way has to tell whether there
// is a NaN.
template <int columns>
bool reduce_groups(ExponentialsRoom& room, const Block& block, const Window& flat, ExponentialsState& state) {
  const int64_t groups = flat.rows / n_group_rows, lanes = groups * columns;
  alignas(64) double top[n_lanes];
  total_groups<columns, Raising::below, false>(ExpLeaf<float>(room, block, flat), top, state.total);
  if (settle(top, lanes, state)) return false;
  if (room.keep_ptr) {
    count_groups<columns>(room.keep_ptr, groups, state.count);
  } else {
    for (int64_t l = 0; l < lanes; ++l) state.count[l] = n_group_rows;
  }
  return true;
}

bool reduce_groups_of(ExponentialsRoom& room, const Block& block, const Window& flat, ExponentialsState& state) {
  return with_columns(flat.columns, [&](auto columns) { return reduce_groups<columns()>(room, block, flat, state); });
}

// Leaves [w.i, w.i + 64 k) of a window become states of the tree; how many rows that were.
int64_t reduce_many(ExponentialsRoom& room, const Block& block, Window& w, ExponentialsState& states) {
  const bool is_dense = block.data.stride_inner == 1 && block.data.stride_n == w.columns;
  const bool are_few = w.groups == 1 && w.columns <= most_group_columns;
  if (!room.is_narrow || !is_dense || !are_few || block.leaf != n_group_rows) return 0;
  const int64_t groups = least((block.n - w.i) / n_group_rows, n_lanes / most_group_columns);
  if (groups < 2) return 0;
  Window flat = w;
  flat.rows = groups * n_group_rows;
  if (!reduce_groups_of(room, block, flat, states)) return 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * w.columns;
    ExponentialsState& state = room.tree.next();
    copy_lanes(states.count + first, w.columns, state.count);
    copy_lanes(states.top + first, w.columns, state.top);
    copy_lanes(states.total + first, w.columns, state.total);
    room.tree.push(w.columns);
  }
  return flat.rows;
}

bool reduce_slices(ExponentialsRoom& room, const Block& block, const Window& w) {
  Window flat;
  if (!are_groups(room, block, w, flat) || !reduce_groups_of(room, block, flat, room.tree.next())) return false;
  room.tree.push(w.lanes());
  return true;
}

NEVER_INLINE void count_rows(const LeafCells& leaf, int64_t* count) {
  uint8_t few[n_lanes] = {};  // of 64 rows
  for (int64_t first = 0; first < leaf.n; first += leaf.lanes) {
    const unsigned char* const keep_ptr = leaf.keep_ptr + first / leaf.lanes * leaf.keep_step;
    for (int64_t l = 0; l < leaf.lanes; ++l) few[l] = static_cast<uint8_t>(few[l] + keep_ptr[l]);
  }
  for (int64_t l = 0; l < leaf.lanes; ++l) count[l] = few[l];
}

void count_leaf(const ExponentialsRoom& room, const LeafCells& leaf, const Window& w, int64_t* count) {
  if (leaf.has_mask_in_place()) return count_rows(leaf, count);
  count_window(room.keep_ptr, w, count);
}

template <class T>
void lift_exponentials(ExponentialsRoom& room, const Block& block, const Parts& parts) {
  const std::unique_ptr<ExponentialsState> states(new ExponentialsState);
  each_window(block, block.leaf, [&](Window& w) {
    w.i = 0, w.rows = block.n;
    if (reduce_slices(room, block, w)) w.i = block.n;
    while (w.i < block.n) {
      if (const int64_t rows = reduce_many(room, block, w, *states)) {
        w.i += rows;
        continue;
      }
      w.rows = least(block.leaf, block.n - w.i);
      const ExpLeaf<T> leaf(room, block, w, true);
      leaf.reduce(Raising::below, block.dtype == Dtype::f64, room.raised, room.tree.next(), false);
      count_leaf(room, leaf.leaf, w, room.tree.next().count);
      room.tree.push(w.lanes());
      w.i += block.leaf;
    }
    w.i = 0;
    const ExponentialsState& state = room.tree.finish(w.lanes());
    const int64_t at = w.o * block.inner + w.c;
    copy_lanes(state.count, w.lanes(), parts.count_ptr + at);
    copy_canonical(state.top, w.lanes(), static_cast<double*>(parts.part_ptr[0]) + at);
    copy_canonical(state.total, w.lanes(), static_cast<double*>(parts.part_ptr[1]) + at);
  });
}

}  // namespace

bool exponentials(const Block& block, const Options&, const Parts& parts) {
  const std::unique_ptr<ExponentialsRoom> room = room_for(block);
  with_width(*room, [&](auto of) { lift_exponentials<decltype(of)>(*room, block, parts); });
  return true;
}

int softmax(const Block& block, const Options& options, const Filled& filled) {
  return normalize(block, options, filled, false);
}
int log_softmax(const Block& block, const Options& options, const Filled& filled) {
  return normalize(block, options, filled, true);
}

}  // namespace MASKSERVE_ISA
}  // namespace maskserve
