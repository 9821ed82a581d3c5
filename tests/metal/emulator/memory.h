// Arrays in threadgroup memory that check every index, also inside a struct of several arrays: what common.metal
// declares with TQ_ARRAY and TQ_ARRAY2.
#pragma once

#include <utility>

#include "runtime.h"

namespace emulator {

inline long checked(long index, long count) {
  if (index < 0 || index >= count) index_error(index, count);
  return index;
}

/// A vector in threadgroup memory.  It is read and written as a whole, and its components are read alone: a compiler
/// may store a component by loading the vector, changing it and storing it, which another lane's store would undo.
template <class T>
class Whole {
 public:
  explicit Whole(T& at) : at_(at) {}
  operator const T&() const { return at_; }
  const Whole& operator=(const T& value) const {
    at_ = value;
    return *this;
  }
  template <class I>
  auto operator[](I i) const -> decltype(static_cast<const T&>(std::declval<T&>())[i]) {
    return static_cast<const T&>(at_)[i];
  }

 private:
  T& at_;
};

/// What an element of an array is taken as: specialised for vectors.
template <class T>
struct Element {
  using type = T&;
};

/// An address in an array, which knows the array's bounds.
template <class T>
class Pointer {
 public:
  Pointer(T* data, long at, long count) : data_(data), at_(at), count_(count) {}
  template <class I>
  typename Element<T>::type operator[](I i) const {
    return typename Element<T>::type(data_[checked(at_ + long(i), count_)]);
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

/// An array of N, which holds garbage when a threadgroup starts.  As in C++ and Metal, adding an integer gives an
/// address.
template <class T, int N>
struct Checked {
  T data[N];
  Checked() { threadgroup_memory(data, sizeof data); }
  template <class I>
  typename Element<T>::type operator[](I i) {
    return typename Element<T>::type(data[checked(long(i), N)]);
  }
  template <class I>
  Pointer<T> operator+(I i) {
    return {data, long(i), N};
  }
};

}  // namespace emulator

#define TQ_ARRAY(TYPE, NAME, COUNT) emulator::Checked<TYPE, COUNT> NAME
#define TQ_ARRAY2(TYPE, NAME, ROWS, COLUMNS) emulator::Checked<emulator::Checked<TYPE, COLUMNS>, ROWS> NAME
