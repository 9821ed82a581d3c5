// Arrays in threadgroup memory that check every index, also inside a struct of several arrays, and note every access:
// what common.metal declares with TQ_ARRAY and TQ_ARRAY2.
#pragma once

#include <utility>

#include "threadgroup.h"

namespace emulator {

inline long checked(long index, long count) {
  if (index < 0 || index >= count) index_error(index, count);
  return index;
}

#ifdef TURBOQUANT_EMULATOR_COUNTS  // numbers that count are noted by their own operators
inline void note_read(const void*) {}
inline void note_write(const void*) {}
#else
inline void note_read(const void* at) { threadgroup_read(at); }
inline void note_write(const void* at) { threadgroup_write(at); }
#endif

/// A number or vector in threadgroup memory.  A vector is read and written as a whole, and its components are read
/// alone: a compiler may store a component by loading the vector, changing it and storing it, which another lane's
/// store would undo.
template <class T>
class Whole {
 public:
  explicit Whole(T& at) : at_(at) {}
  operator const T&() const {
    note_read(&at_);
    return at_;
  }
  const Whole& operator=(const T& value) const {
    note_write(&at_);
    at_ = value;
    return *this;
  }
  template <class I>
  auto operator[](I i) const -> decltype(static_cast<const T&>(std::declval<T&>())[i]) {
    note_read(&at_);
    return static_cast<const T&>(at_)[i];
  }

 private:
  T& at_;
};

template <class T, int N>
struct Checked;

/// What an element of an array is taken as.
template <class T>
struct Element {
#ifdef TURBOQUANT_EMULATOR_COUNTS
  using type = T&;
#else
  using type = Whole<T>;
#endif
};
template <class T, int N>
struct Element<Checked<T, N>> {
  using type = Checked<T, N>&;
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
