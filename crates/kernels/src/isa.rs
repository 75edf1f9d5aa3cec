//! Which instructions a kernel may use: detected once, passed down explicitly, compiled by [`multiversion!`].

use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// An instruction set that kernels are compiled for.
///
/// The best one that the processor has is used, unless the environment variable `POSTTRAIN_ISA` names another
/// (`avx512bf16`, `avx512`, `avx2`, `neon`, `portable`; empty for none) or [`Isa::with`] forces one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 (F, BW, DQ, VL) with the bfloat16 dot product `VDPBF16PS`.
    Avx512Bf16,
    /// AVX-512 (F, BW, DQ, VL).
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// AArch64's NEON.
    Neon,
    /// Whatever the target has at least; slow where that lacks a fused multiply-add.
    Portable,
}

impl Isa {
    /// Every instruction set, the best first.
    pub const ALL: [Isa; 5] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Portable];

    /// Whether this processor has it.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => is_x86_feature_detected!("avx512bf16") && Isa::Avx512.available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Isa::Avx2.available()
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            Isa::Portable => true,
            _ => false,
        }
    }

    /// Whether one instruction multiplies pairs of bfloat16.
    pub(crate) fn multiplies_pairs(self) -> bool {
        self == Isa::Avx512Bf16
    }

    /// The instruction set that `POSTTRAIN_ISA` names, or else the best that the processor has.
    ///
    /// # Errors
    /// A name that is none, or that of one which the processor does not have.
    pub fn chosen() -> Result<Isa, String> {
        let best = Isa::ALL.into_iter().find(|isa| isa.available()).unwrap_or(Isa::Portable);
        let Some(name) = std::env::var_os("POSTTRAIN_ISA").filter(|name| !name.is_empty()) else { return Ok(best) };
        match name.to_string_lossy().parse::<Isa>() {
            Ok(isa) if isa.available() => Ok(isa),
            Ok(isa) => Err(format!("POSTTRAIN_ISA: this processor has no {isa}; the best it has is {best}")),
            Err(error) => Err(format!("POSTTRAIN_ISA: {error}")),
        }
    }

    /// The instruction set that kernels called from this thread use.
    ///
    /// # Panics
    /// If `POSTTRAIN_ISA` names none ([`Isa::chosen`]).
    pub fn current() -> Isa {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        let detected = || *DETECTED.get_or_init(|| Isa::chosen().unwrap_or_else(|reason| panic!("{reason}")));
        FORCED.get().unwrap_or_else(detected)
    }

    /// Runs `work` with the kernels that it calls from this thread compiled for this instruction set. A
    /// [`PackedMatrix`](crate::PackedMatrix) and a [`KvBlock`](crate::KvBlock) stay with the one they were made under.
    ///
    /// # Panics
    /// If the processor does not have it.
    pub fn with<R>(self, work: impl FnOnce() -> R) -> R {
        struct Restore(Option<Isa>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        assert!(self.available(), "this processor has no {self}");
        let _restore = Restore(FORCED.replace(Some(self)));
        work()
    }
}

thread_local! {
    /// The instruction set forced by [`Isa::with`] on this thread.
    static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Avx512 => "avx512",
            Isa::Avx2 => "avx2",
            Isa::Neon => "neon",
            Isa::Portable => "portable",
        })
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Isa::ALL
            .into_iter()
            .find(|isa| isa.to_string() == name)
            .ok_or_else(|| format!("no instruction set is called `{name}`"))
    }
}

/// Defines a function with a leading argument `isa: Isa` whose body is compiled once for each instruction set.
///
/// The body must do its work in plain loops and `#[inline(always)]` helpers: what is not inlined into it is compiled for
/// the target's baseline only. In particular, threads are started outside.
macro_rules! multiversion {
    (
        $(#[$meta:meta])*
        $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "kernels take their operands as plain slices")]
        $visibility fn $name(isa: $crate::isa::Isa, $($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn body($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                body($($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                body($($argument),*)
            }
            match isa {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: `Isa::current` returns only what the processor was seen to have.
                $crate::isa::Isa::Avx512Bf16 | $crate::isa::Isa::Avx512 => unsafe { avx512($($argument),*) },
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::isa::Isa::Avx2 => unsafe { avx2($($argument),*) },
                // NEON is part of the AArch64 baseline.
                _ => body($($argument),*),
            }
        }
    };
}
pub(crate) use multiversion;
