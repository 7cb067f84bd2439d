// Leaves joined in a power-of-two tree.
// Included inside the namespace of one instruction set; see common.hpp why nothing here may be shared.

constexpr int max_levels = 64;

// A binary counter of states: slot k holds a finished tree of 2^k leaves where bit k of n_leaves is set.
template <class State>
struct LeafTree {
  std::unique_ptr<State[]> room;
  State* slot_ptr[max_levels];
  State* carry_ptr;
  int64_t n_leaves = 0;
  CountState count;  // of the mask, where there is one: exact, so one running sum will do

  void begin(int64_t most_leaves) {
    if (room) return;
    int levels = 1;
    while (most_leaves >> levels) ++levels;
    room.reset(new State[levels + 1]);  // new without (): not initialised
    for (int k = 0; k < levels; ++k) slot_ptr[k] = &room[k];
    carry_ptr = &room[levels];
  }

  // The state that the next push() adds.
  State& next() { return *carry_ptr; }

  void push(int64_t n) {
    int level = 0;
    for (; n_leaves >> level & 1; ++level) join_slot(level, n);
    State* const filled_ptr = carry_ptr;
    carry_ptr = slot_ptr[level], slot_ptr[level] = filled_ptr;
    ++n_leaves;
  }

  // All leaves: what is left joins from the right. The tree is empty again after.
  State& finish(int64_t n) {
    if (n_leaves == 0) {
      carry_ptr->clear(n);
      return *carry_ptr;
    }
    int level = 0;
    while (!(n_leaves >> level & 1)) ++level;
    State* const filled_ptr = slot_ptr[level];
    slot_ptr[level] = carry_ptr, carry_ptr = filled_ptr;
    for (++level; n_leaves >> level; ++level) {
      if (n_leaves >> level & 1) join_slot(level, n);
    }
    n_leaves = 0;
    return *carry_ptr;
  }

  void join_slot(int level, int64_t n) {
    slot_ptr[level]->join(*carry_ptr, n);
    State* const joined_ptr = slot_ptr[level];
    slot_ptr[level] = carry_ptr, carry_ptr = joined_ptr;
  }
};
