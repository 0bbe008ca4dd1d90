#include "best_fit.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

namespace fastpost {
namespace {

constexpr int64_t kNone = -1;

// Open packs by the room that is left in them: a list for each room, threaded through `below_`.
class Packs {
 public:
  // A pack with the least room that is at least `size`, a new one of `room` if none has, and what is left in it then.
  std::pair<int64_t, int64_t> take(int64_t size, int64_t room) {
    const auto best = top_.lower_bound(size);
    if (best == top_.end()) {
      below_.push_back(kNone);
      return {int64_t(below_.size()) - 1, room - size};
    }
    const auto [left, pack] = *best;
    if (below_[pack] == kNone)
      top_.erase(best);
    else
      best->second = below_[pack];
    return {pack, left - size};
  }

  void put(int64_t pack, int64_t left) {
    const auto [place, first] = top_.try_emplace(left, pack);
    below_[pack] = first ? kNone : std::exchange(place->second, pack);
  }

 private:
  std::map<int64_t, int64_t> top_;  // room left -> the pack that came to it last
  std::vector<int64_t> below_;      // pack -> the one that came to the same room before it
};

}  // namespace

std::vector<int64_t> best_fit(const std::vector<int64_t>& sizes, int64_t room) {
  std::vector<int64_t> order(sizes.size()), found(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
  Packs packs;
  for (const int64_t u : order) {
    TORCH_CHECK(sizes[u] > 0 && sizes[u] <= room, "unit ", u, " must be of 1 to ", room, " tokens, got ", sizes[u]);
    const auto [pack, left] = packs.take(sizes[u], room);
    packs.put(pack, left);
    found[u] = pack;
  }
  return found;
}

}  // namespace fastpost
