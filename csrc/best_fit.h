// Which units share a pack: the unit-at-a-time form of best_fit in fastpost/packing/fit.py.
#pragma once

#include <cstdint>
#include <vector>

namespace fastpost {

// The pack of each unit, of sizes 1..room: largest first, each into the pack that it leaves the least room in. Among
// equals, the earlier unit comes first and the pack that came to that room last is taken. O(n log(distinct rooms)).
std::vector<int64_t> best_fit(const std::vector<int64_t>& sizes, int64_t room);

}  // namespace fastpost
