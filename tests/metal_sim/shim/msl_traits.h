// <metal_type_traits>: written on clang's builtins, so that no C++ library is needed.
#pragma once

namespace metal {

template <class T> struct type_identity { using type = T; };
template <class T> using type_identity_t = typename type_identity<T>::type;

template <class T> struct remove_cv { using type = __remove_cv(T); };
template <class T> using remove_cv_t = __remove_cv(T);
template <class T> struct remove_reference { using type = __remove_reference_t(T); };
template <class T> using remove_reference_t = __remove_reference_t(T);
template <class T> struct decay { using type = __decay(T); };
template <class T> using decay_t = __decay(T);
template <class T> struct make_unsigned { using type = __make_unsigned(T); };
template <class T> using make_unsigned_t = __make_unsigned(T);
template <class T> __add_rvalue_reference(T) declval() noexcept;

template <class A, class B> constexpr constant bool is_same_v = __is_same(A, B);
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B> constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <class A, class B> struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class T> constexpr constant bool is_pointer_v = __is_pointer(T);
template <class T> struct is_pointer : bool_constant<__is_pointer(T)> {};
template <class T> constexpr constant bool is_unsigned_v = __is_unsigned(T);
template <class T> struct is_unsigned : bool_constant<__is_unsigned(T)> {};

// MLX specialises these three for bfloat, so each value comes from the struct.
template <class T> struct is_integral : bool_constant<__is_integral(T)> {};
template <class T> constexpr constant bool is_integral_v = is_integral<T>::value;
template <class T> constexpr bool msl_is_float =
    __is_same(__remove_cv(T), float) || __is_same(__remove_cv(T), half) || __is_same(__remove_cv(T), bfloat);
template <class T> struct is_floating_point : bool_constant<msl_is_float<T>> {};
template <class T> constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T> struct is_arithmetic : bool_constant<__is_integral(T) || is_floating_point<T>::value> {};
template <class T> constexpr constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T> struct is_signed : bool_constant<is_floating_point<T>::value || __is_signed(T)> {};
template <class T> constexpr constant bool is_signed_v = is_signed<T>::value;

template <class...> struct _disjunction : false_type {};
template <class T> struct _disjunction<T> : T {};
template <class T, class... R> struct _disjunction<T, R...> : conditional_t<bool(T::value), T, _disjunction<R...>> {};
template <class...> struct _conjunction : true_type {};
template <class T> struct _conjunction<T> : T {};
template <class T, class... R> struct _conjunction<T, R...> : conditional_t<bool(T::value), _conjunction<R...>, T> {};

template <class T> struct remove_addrspace { using type = T; };
#ifndef MSL_ERASE
template <class T> struct remove_addrspace<T device> { using type = T; };
template <class T> struct remove_addrspace<T threadgroup> { using type = T; };
template <class T> struct remove_addrspace<T constant> { using type = T; };
#else
template <class T> struct remove_addrspace<const T> { using type = T; };
#endif
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;

}  // namespace metal
