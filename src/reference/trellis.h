// The exact search through a trellis (format.h), in double: what "nearest" means for trellis codes.
#pragma once

#include <cstdint>

namespace turboquant::reference {

/// Of one group of 32 coordinates: indices of levels, i.e. 4w + 2 z1 + z0, that follow a closed path and whose levels
/// have the least squared distance to `targets`, in levels.  Returns that distance, of the targets as they count: those
/// beyond `trellis_limit` as the limit.
double search_trellis(int bits, const double targets[32], int indices[32]);

/// The path as words of a group.
void write_group(int bits, const int indices[32], uint32_t* words);
void read_group(int bits, const uint32_t* words, int indices[32]);

}  // namespace turboquant::reference
