// A backend is a table of functions: encode, decode, transform, attend.  Their parameters have been checked before.
#pragma once

#include "turboquant/turboquant.h"

namespace turboquant {

/// Parameters reach these functions checked; sizes may be zero.
struct BackendTable {
  const char* name;
  void (*encode)(const EncodeParams&);
  void (*decode)(const DecodeParams&);
  void (*attend)(const AttendParams&);
  void (*transform)(const TransformParams&);
};

namespace reference {
extern const BackendTable table;
}
namespace cpu {
extern const BackendTable table;
}

}  // namespace turboquant
