// Arrays in threadgroup memory that check every index, also inside a struct of several arrays: what common.metal
// declares with TQ_ARRAY and TQ_ARRAY2.
#pragma once

#include "runtime.h"

namespace emulator {

inline long checked(long index, long count) {
  if (index < 0 || index >= count) index_error(index, count);
  return index;
}

/// An address in an array, which knows the array's bounds.
template <class T>
class Pointer {
 public:
  Pointer(T* data, long at, long count) : data_(data), at_(at), count_(count) {}
  template <class I>
  T& operator[](I i) const {
    return data_[checked(at_ + long(i), count_)];
  }
  template <class I>
  Pointer operator+(I i) const {
    return {data_, at_ + long(i), count_};
  }
  /// The address itself, of elements from 0 to `last`.
  T* span(long last) const {
    checked(at_ + last, count_);
    return data_ + checked(at_, count_);
  }

 private:
  T* data_;
  long at_, count_;
};

/// An array of N.  As in C++ and Metal, adding an integer gives an address.
template <class T, int N>
struct Checked {
  T data[N];
  template <class I>
  T& operator[](I i) {
    return data[checked(long(i), N)];
  }
  template <class I>
  Pointer<T> operator+(I i) {
    return {data, long(i), N};
  }
};

}  // namespace emulator

#define TQ_ARRAY(TYPE, NAME, COUNT) emulator::Checked<TYPE, COUNT> NAME
#define TQ_ARRAY2(TYPE, NAME, ROWS, COLUMNS) emulator::Checked<emulator::Checked<TYPE, COLUMNS>, ROWS> NAME
