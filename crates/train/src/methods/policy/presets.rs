//! Published policy gradients by name: each is a choice of the parts of [`mod@objectives::policy`].

use crate::methods::Preset;

/// The published methods of the family.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "grpo",
        title: "group relative policy optimisation",
        paper: "Shao et al. 2024, arXiv 2402.03300",
        formula: "L = Σ_t w_t [ - min(r_t A, clip(r_t, 1 - ε, 1 + ε_high) A) + β KL_t ],  A = (r - mean) / (std + 1e-4)",
        settings: "",
    },
    Preset {
        name: "dr_grpo",
        title: "GRPO done right: no division by lengths or deviations",
        paper: "Liu et al. 2025, arXiv 2503.20783",
        formula: "L = - 1/(S L_max) Σ_t min(r_t A, clip(r_t) A),  A = r - mean",
        settings: r#"[objective]
scale_rewards = "none"
aggregation = "constant"
"#,
    },
    Preset {
        name: "bnpo",
        title: "GRPO over all tokens of the update",
        paper: "TRL `loss_type = \"bnpo\"`; DAPO, arXiv 2503.14476, equation 8",
        formula: "L = - 1/T Σ_t min(r_t A, clip(r_t) A)",
        settings: r#"[objective]
aggregation = "token"
"#,
    },
    Preset {
        name: "lite_ppo",
        title: "GRPO with the deviation of the batch, over all tokens",
        paper: "Liu et al. 2025, \"Lite PPO\", arXiv 2508.08221",
        formula: "L = - 1/T Σ_t min(r_t A, clip(r_t) A),  A = (r - mean) / (std of the batch + 1e-4)",
        settings: r#"[objective]
scale_rewards = "batch"
aggregation = "token"
"#,
    },
    Preset {
        name: "dapo",
        title: "decoupled clip and dynamic sampling",
        paper: "Yu et al. 2025, arXiv 2503.14476",
        formula: "L = - 1/T Σ_t min(r_t A, clip(r_t, 0.8, 1.28) A); groups without variance are sampled anew; overlong completions pay",
        settings: r#"max_resampling_rounds = 4
overlong_margin = 64

[objective]
epsilon_high = 0.28
aggregation = "token"
"#,
    },
    Preset {
        name: "luspo",
        title: "length-unbiased sequence policy optimisation",
        paper: "2026, arXiv 2602.05261",
        formula: "L = - 1/S Σ_i |y_i| min(s_i A, clip(s_i) A),  s_i = (Π_t r_t)^(1/|y_i|)",
        settings: r#"[objective]
importance_sampling_level = "sequence"
aggregation = "sequence_sum"
epsilon = 2e-3
epsilon_high = 2.5e-3
"#,
    },
    Preset {
        name: "gspo",
        title: "group sequence policy optimisation",
        paper: "Zheng et al. 2025, arXiv 2507.18071",
        formula: "L = - 1/S Σ_i min(s_i A, clip(s_i) A),  s_i = (Π_t r_t)^(1/|y_i|)",
        settings: r#"[objective]
importance_sampling_level = "sequence"
aggregation = "sequence"
epsilon = 3e-4
epsilon_high = 4e-4
"#,
    },
    Preset {
        name: "gspo_token",
        title: "GSPO with a gradient for each token",
        paper: "Zheng et al. 2025, arXiv 2507.18071, section 4.3",
        formula: "L = - 1/S Σ_i 1/|y_i| Σ_t min(s_it A_t, clip(s_it) A_t),  s_it = sg[s_i] π(y_t) / sg[π(y_t)]",
        settings: r#"[objective]
importance_sampling_level = "sequence_token"
aggregation = "sequence"
epsilon = 3e-4
epsilon_high = 4e-4
"#,
    },
    Preset {
        name: "cispo",
        title: "clipped importance weights instead of clipped updates",
        paper: "MiniMax-M1 2025, arXiv 2506.13585",
        formula: "L = - 1/T Σ_t sg[min(r_t, ε_high)] A log π(y_t)",
        settings: r#"[objective]
clip = "cispo"
epsilon_high = 5.0
aggregation = "token"
"#,
    },
    Preset {
        name: "sapo",
        title: "soft adaptive policy optimisation",
        paper: "Gao et al. 2025, arXiv 2511.20347",
        formula: "L = - 1/S Σ_i 1/|y_i| Σ_t 4/τ σ(τ (r_t - 1)) A",
        settings: r#"[objective]
clip = "sapo"
aggregation = "sequence"
"#,
    },
    Preset {
        name: "gmpo",
        title: "geometric-mean policy optimisation",
        paper: "Zhao et al. 2025, arXiv 2507.20673",
        formula: "L = - 1/S Σ_i A exp(1/|y_i| Σ_t clip±(log r_t, -ε, ε_high))",
        settings: r#"[objective]
clip = "gmpo"
aggregation = "sequence"
epsilon = 0.4
epsilon_high = 0.4
"#,
    },
    Preset {
        name: "vespo",
        title: "variational sequence-level soft policy optimisation",
        paper: "2026, arXiv 2602.10693",
        formula: "L = - 1/T Σ_t sg[φ(w)] A log π(y_t),  φ(w) = exp(λ + k log w - λ w),  w = Π_t r_t",
        settings: r#"[objective]
clip = "vespo"
aggregation = "token"
"#,
    },
    Preset {
        name: "dppo_tv",
        title: "divergence proximal policy optimisation, total variation",
        paper: "2026, arXiv 2602.04879",
        formula: "L = - 1/T Σ_t m_t sg[min(r_t, 20)] A log π(y_t),  m_t = 0 where |π - π_old| > ε on the side of A",
        settings: r#"[objective]
clip = "dppo_tv"
epsilon = 0.15
delta = 20.0
aggregation = "token"
"#,
    },
    Preset {
        name: "dppo_kl",
        title: "divergence proximal policy optimisation, Kullback-Leibler",
        paper: "2026, arXiv 2602.04879",
        formula: "L = - 1/T Σ_t m_t sg[min(r_t, 20)] A log π(y_t),  m_t = 0 where the binary KL(π_old ‖ π) > ε on the side of A",
        settings: r#"[objective]
clip = "dppo_kl"
epsilon = 0.05
delta = 20.0
aggregation = "token"
"#,
    },
    Preset {
        name: "dual_clip",
        title: "PPO's clip with a floor for bad actions",
        paper: "Ye et al. 2019, arXiv 1912.09729",
        formula: "L = - 1/T Σ_t max(min(r_t A, clip(r_t) A), δ A) where A < 0, else min(r_t A, clip(r_t) A)",
        settings: r#"[objective]
delta = 3.0
aggregation = "token"
"#,
    },
    Preset {
        name: "clip_cov",
        title: "GRPO without the tokens that cost most entropy",
        paper: "Cui et al. 2025, arXiv 2505.22617",
        formula: "as grpo, without a few tokens of large (A - mean A)(log π - mean log π)",
        settings: r#"[objective]
clip = "clip_cov"
aggregation = "token"
"#,
    },
    Preset {
        name: "kl_cov",
        title: "GRPO with a penalty on the tokens that cost most entropy",
        paper: "Cui et al. 2025, arXiv 2505.22617",
        formula: "L = - 1/T Σ_t [ r_t A - c |log r_t| where (A - mean A)(log π - mean log π) is largest ]",
        settings: r#"[objective]
clip = "kl_cov"
cov_ratio = 2e-3
aggregation = "token"
"#,
    },
    Preset {
        name: "high_entropy",
        title: "GRPO on the fifth of the tokens where the policy is least sure",
        paper: "Wang et al. 2025, arXiv 2506.01939",
        formula: "as grpo, over the tokens whose entropy is in the highest 20 %",
        settings: r#"[objective]
top_entropy_quantile = 0.2
aggregation = "token"
"#,
    },
    Preset {
        name: "grpo_ceu",
        title: "GRPO whose bad completions are unlearnt by CE-U",
        paper: "Yang 2025, arXiv 2503.01224",
        formula: "∇L = - Σ_t w_t r_t A ∇ log π(y_t) for A > 0, Σ_t w_t r_t |A| ∇[- log(1 - π(y_t))] for A < 0; the clip is GRPO's",
        settings: r#"[objective]
negative = "ce_u"
"#,
    },
    Preset {
        name: "icepop",
        title: "GRPO that leaves out tokens on which sampler and trainer disagree",
        paper: "Ling Team 2025, \"Every Step Evolves\", arXiv 2510.18855",
        formula: "as grpo, each token times c_t where 0.5 ≤ c_t ≤ 5, else 0;  c_t = π_old(y_t) / π_sampler(y_t)",
        settings: r#"old_policy = "trainer"

[objective]
importance_sampling_mode = "token_mask"
importance_sampling_clip_min = 0.5
importance_sampling_clip_max = 5.0
"#,
    },
    Preset {
        name: "mis",
        title: "GRPO with masked importance sampling of whole sequences",
        paper: "Liu et al. 2025, \"When Speed Kills Stability\"; TRL's default",
        formula: "as grpo, each sequence times Π_t c_t where that is at most 3, else 0",
        settings: r#"old_policy = "trainer"

[objective]
importance_sampling_mode = "sequence_mask"
importance_sampling_clip_max = 3.0
"#,
    },
    Preset {
        name: "rloo",
        title: "REINFORCE leave-one-out",
        paper: "Ahmadian et al. 2024, arXiv 2402.14740",
        formula: "L = - 1/S Σ_i min(ρ_i A_i, clip(ρ_i) A_i),  A_i = R_i - mean of the others,  R_i = r_i - β Σ_t (log π - log ρ),  ρ_i = Π_t r_t",
        settings: r#"num_generations = 2

[objective]
baseline = "leave_one_out"
scale_rewards = "none"
importance_sampling_level = "sequence_product"
aggregation = "sequence"
beta = 0.05
kl = "k1"
kl_in = "reward"
"#,
    },
    Preset {
        name: "reinforce",
        title: "REINFORCE: the reward itself",
        paper: "Williams 1992, Machine Learning 8",
        formula: "L = - 1/S Σ_i r_i Σ_t log π(y_t)",
        settings: r#"num_generations = 1

[objective]
baseline = "none"
scale_rewards = "none"
clip = "none"
aggregation = "sequence_sum"
"#,
    },
    Preset {
        name: "remax",
        title: "REINFORCE with the reward of the greedy answer as baseline",
        paper: "Li et al. 2023, arXiv 2310.10505",
        formula: "L = - 1/S Σ_i (r_i - r_greedy) Σ_t log π(y_t)",
        settings: r#"num_generations = 1

[objective]
baseline = "greedy"
scale_rewards = "none"
clip = "none"
aggregation = "sequence_sum"
"#,
    },
    Preset {
        name: "reinforce_plus_plus",
        title: "REINFORCE++: PPO's clip, returns of tokens and whitening, without a critic",
        paper: "Hu et al. 2025, arXiv 2501.03262",
        formula: "L = - 1/T Σ_t min(r_t A_t, clip(r_t) A_t),  A_t = whiten(r - β Σ_{k≥t} (log π - log ρ))",
        settings: r#"num_generations = 1

[objective]
baseline = "none"
scale_rewards = "none"
credit = "token"
whiten_advantages = true
aggregation = "token"
beta = 0.01
kl = "k1"
kl_in = "reward"
"#,
    },
    Preset {
        name: "reinforce_plus_plus_baseline",
        title: "REINFORCE++ with the mean of the group as baseline",
        paper: "Hu et al. 2025, arXiv 2501.03262",
        formula: "L = 1/T Σ_t [ - min(r_t A, clip(r_t) A) + β k2_t ],  A = whiten(r - mean)",
        settings: r#"[objective]
scale_rewards = "none"
whiten_advantages = true
aggregation = "token"
beta = 0.001
kl = "k2"
"#,
    },
    Preset {
        name: "ppo",
        title: "proximal policy optimisation with a value model",
        paper: "Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155",
        formula: "L = - 1/T Σ_t min(r_t A_t, clip(r_t) A_t),  A_t = whiten(GAE),  reward_t = - β (log π - log ρ) + score at the end",
        settings: r#"num_generations = 1
num_iterations = 4
shuffle_minibatches = true

[objective]
baseline = "value"
whiten_advantages = true
aggregation = "token"
beta = 0.05
kl = "k1"
kl_in = "reward"
"#,
    },
    Preset {
        name: "dro_ppo",
        title: "distributionally robust PPO: for the worst mix of the prompts",
        paper: "Mandal et al. 2025, arXiv 2503.00539",
        formula: "as ppo, tokens of prompt i times n q_i;  q = argmin Σ q_i V_i,  V_i = mean of r - β Σ_t (log π - log ρ),  TV(q, 1/n) ≤ 0.2",
        settings: r#"prompts_per_step = 64
num_generations = 1
num_iterations = 4
shuffle_minibatches = true
worst_case = { ball = "total_variation", radius = 0.2 }

[objective]
baseline = "value"
whiten_advantages = true
aggregation = "token"
beta = 0.05
kl = "k1"
kl_in = "reward"
"#,
    },
    Preset {
        name: "vc_ppo",
        title: "PPO with a pretrained critic and two λ, for long answers",
        paper: "Yuan et al. 2025, arXiv 2503.01491",
        formula: "as ppo; the value model learns alone first, and from returns with λ = 1",
        settings: r#"num_generations = 1
num_iterations = 4
shuffle_minibatches = true

[value]
warmup_steps = 10

[objective]
baseline = "value"
lam = 0.95
lam_value = 1.0
whiten_advantages = true
aggregation = "token"
beta = 0.05
kl = "k1"
kl_in = "reward"
"#,
    },
];
