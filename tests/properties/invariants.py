"""Which tests hold each numerical invariant, and which controls show that its breach would be seen.

A control breaks the invariant on purpose and finds an error of at least a hundred times what the invariant allows. Node ids
are paths from the repository's root and function names; a parametrised test is named once.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Invariant(NamedTuple):
    """One line of what must hold, the tests that hold it, and their controls."""

    statement: str
    tests: tuple[str, ...]
    controls: tuple[str, ...]


def _of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{file}.py::test_{name}" for name in names)


BUILT_IN_JOB = "integration/test_built_in_job"
RESUME = "integration/test_resume"
ADAPTERS = "properties/test_adapters"
HEAD_AND_RECOMPUTE = "properties/test_head_and_recompute"
LEARNING = "properties/test_learning"
LOSS_POSITIONS = "properties/test_loss_positions"
MASKS = "properties/test_masks"
METRICS_AND_GENERATION = "properties/test_metrics_and_generation"
ORDER = "properties/test_order"
PADDING_AND_PACKING = "properties/test_padding_and_packing"
PREFERENCE_LOSS = "properties/test_preference_loss"
REFERENCE = "properties/test_reference"
SCHEDULE_AND_OPTIMIZER = "properties/test_schedule_and_optimizer"
TRAINING_PROPERTIES = "properties/test_training_properties"
TRAJECTORIES = "properties/test_trajectories"
DPO_LOSS = "reference/test_dpo_loss"
EXACT_GRADIENTS = "reference/test_exact_gradients"
EXACT_PAIRS = "reference/test_exact_pairs"
TRL_LOSS = "reference/test_trl_loss"
TWO_PROCESSES = "reference/test_two_processes"
UNIT_GENERATE = "unit/evaluation/test_generate"
UNIT_PERPLEXITY = "unit/evaluation/test_perplexity"
UNIT_QUANTIZED = "unit/models/test_quantized"
UNIT_DPO = "unit/modules/test_dpo"
UNIT_DPO_NUMBERS = "unit/modules/test_dpo_numbers"
UNIT_PARALLEL = "unit/modules/test_parallel"
UNIT_SFT = "unit/modules/test_sft"
UNIT_LOSS_SCALING = "unit/modules/test_loss_scaling"
UNIT_PLAN = "unit/packing/test_plan"

# fmt: off
INVARIANTS: Final[dict[str, Invariant]] = {
    "N1": Invariant(
        "Padding on either side, by any token, changes nothing; training has none, evaluation and generation do.",
        _of(PADDING_AND_PACKING, "n01_any_padding_on_either_side_gives_what_ours_gives_without")
        + _of(EXACT_GRADIENTS, "padding_free_equals_padded"),
        _of(PADDING_AND_PACKING, "n01_control_padding_that_is_attended_to")
        + _of(EXACT_GRADIENTS, "left_padding_without_a_mask_is_caught"),
    ),
    "N2": Invariant(
        "Tokens where nobody looks, padding or silent neighbours, are irrelevant.",
        _of(PADDING_AND_PACKING, "n02_tokens_that_no_row_attends_to_are_irrelevant"),
        _of(PADDING_AND_PACKING, "n02_control_tokens_that_are_attended_to"),
    ),
    "N3": Invariant(
        "Packed rows are the token-weighted sum of rows alone; no target is another row's; another neighbour moves no bit.",
        _of(PADDING_AND_PACKING, "n03_packed_is_the_token_weighted_sum_of_rows_alone",
            "n03_another_first_row_leaves_every_bit_of_the_others")
        + _of(EXACT_GRADIENTS, "any_packing_equals_one_row_at_a_time"),
        _of(PADDING_AND_PACKING, "n03_control_rows_that_see_their_neighbours",
            "n03_control_targets_across_the_border_of_rows")
        + _of(EXACT_GRADIENTS, "packing_without_restarting_positions_is_caught"),
    ),
    "N4": Invariant(
        "Any partition of a step into micro-batches, silent ones among them, is the step.",
        _of(PADDING_AND_PACKING, "n04_any_partition_of_a_step_is_the_step")
        + _of(EXACT_GRADIENTS, "any_split_into_micro_batches_is_the_same_step")
        + _of(UNIT_DPO_NUMBERS, "one_step_may_come_in_any_number_of_micro_batches"),
        _of(PADDING_AND_PACKING, "n04_control_a_mean_of_the_micro_batches_own_means"),
    ),
    "N5": Invariant(
        "The order of rows changes no sum, and losses of rows move with their rows.",
        _of(PADDING_AND_PACKING, "n05_losses_of_rows_move_with_their_rows")
        + _of(TRAINING_PROPERTIES, "the_order_of_rows_changes_nothing"),
        _of(PADDING_AND_PACKING, "n05_control_rows_move_and_their_counts_do_not"),
    ),
    "N6": Invariant(
        "Two processes on one global batch are one process, with uneven token counts and an empty rank.",
        _of(UNIT_PARALLEL, "uneven_and_empty_ranks_sum_to_the_gradient_of_one_process")
        + _of(TWO_PROCESSES, "loss_and_gradients_of_every_step_are_those_of_one_process"),
        _of(TWO_PROCESSES, "averages_of_rank_means_are_caught"),
    ),
    "N7": Invariant(
        "Only supervised tokens have a loss, each scored by the logits before it; rows of prompt alone have no gradient.",
        _of(LOSS_POSITIONS, "n07_rows_of_prompt_alone_have_no_loss_and_no_gradient",
            "n07_a_token_is_scored_by_the_logits_before_it")
        + _of(TRAINING_PROPERTIES, "only_supervised_rows_send_a_gradient_into_the_head",
            "what_follows_the_last_supervised_token_changes_nothing"),
        _of(LOSS_POSITIONS, "n07_control_a_token_that_is_scored_by_its_own_logits",
            "n07_control_a_mask_that_holds_the_prompt"),
    ),
    "N8": Invariant(
        "The masked loss and its slopes are those of 40-digit arithmetic.",
        _of(LOSS_POSITIONS, "n08_the_masked_loss_is_that_of_40_digits"),
        _of(LOSS_POSITIONS, "n08_control_a_mean_over_all_tokens", "n08_control_the_mask_turned_round"),
    ),
    "N9": Invariant(
        "The end of turn is learned once per answer and never where it was cut off; masks of turns lie end to end.",
        _of(MASKS, "n09_each_turn_learns_its_end_once_and_nothing_outside_it", "n09_a_cut_turn_learns_no_end",
            "n09_the_mask_of_a_talk_is_that_of_its_turns_end_to_end"),
        _of(MASKS, "n09_control_a_mask_one_token_early"),
    ),
    "N10": Invariant(
        "Tokens of the pieces are those of the whole, they come back as text, and users' words stay words.",
        _of(MASKS, "n10_pieces_are_the_whole_and_come_back_as_text",
            "n10_words_that_look_like_the_templates_stay_words"),
        _of(MASKS, "n10_control_one_tokenizer_call_for_the_whole_text"),
    ),
    "N11": Invariant(
        "Any chunk of the head is the whole head, frozen or trained.",
        _of(HEAD_AND_RECOMPUTE, "n11_any_chunk_of_the_head_is_the_whole_head")
        + _of(EXACT_GRADIENTS, "chunked_head_equals_plain_cross_entropy"),
        _of(HEAD_AND_RECOMPUTE, "n11_control_the_last_chunk_is_left_out",
            "n11_control_a_softmax_over_a_part_of_the_words"),
    ),
    "N12": Invariant(
        "Recomputed activations, fewer logits and a cache change nothing, dropout included.",
        _of(HEAD_AND_RECOMPUTE, "n12_activations_computed_twice_change_nothing",
            "n12_neither_all_logits_nor_a_cache_change_anything"),
        _of(HEAD_AND_RECOMPUTE, "n12_control_dropout_is_drawn_anew_in_the_second_pass",
            "n12_control_logits_of_other_places"),
    ),
    "N13": Invariant(
        "B = 0 is the base to the bit; merged is unmerged; saved is loaded; only the adapter moves.",
        _of(ADAPTERS, "n13_an_adapter_at_its_start_is_the_base_in_every_bit",
            "n13_merged_is_unmerged_in_loss_and_gradients", "n13_merged_meanwhile_is_unmerged_in_float32",
            "n13_saved_and_loaded_is_the_same_to_the_bit", "n13_n14_training_moves_the_adapter_and_no_bit_of_the_base")
        + _of(TRAINING_PROPERTIES, "an_adapter_at_its_start_is_the_base"),
        _of(ADAPTERS, "n13_control_an_adapter_that_starts_elsewhere", "n13_control_a_merge_at_another_scale",
            "n13_control_a_base_that_trains_has_another_hash", "n13_saved_and_loaded_is_the_same_to_the_bit"),
    ),
    "N14": Invariant(
        "Four bits are the nearest normal floats, quantised scales near them; gradients go through them to the adapter alone.",
        _of(ADAPTERS, "n14_four_bits_are_the_nearest_normal_floats",
            "n14_gradients_go_through_the_nearest_normal_floats",
            "n13_n14_training_moves_the_adapter_and_no_bit_of_the_base")
        + _of(UNIT_QUANTIZED, "a_4_bit_base_stays_bit_for_bit_while_every_adapter_matrix_moves"),
        _of(ADAPTERS, "n14_control_another_grid_and_another_block",
            "n14_gradients_go_through_the_nearest_normal_floats"),
    ),
    "N15": Invariant(
        "Preference losses and their slopes are those of 50-digit arithmetic, and TRL's.",
        _of(DPO_LOSS, "loss_rewards_and_gradients_equal_the_decimals")
        + _of(TRL_LOSS, "loss_rewards_and_gradients_equal_those_of_trl"),
        _of(DPO_LOSS, "a_wrong_formula_is_told_apart_by_loss_and_by_gradient"),
    ),
    "N16": Invariant(
        "A policy that is its reference costs ln 2, dropout and recomputation included, with the closed-form gradient.",
        _of(PREFERENCE_LOSS, "n16_a_policy_that_is_its_reference_costs_ln_2")
        + _of(UNIT_DPO, "the_first_step_of_a_trained_adapter_costs_ln_2_and_rewards_nothing"),
        _of(PREFERENCE_LOSS, "n16_control_a_reference_that_is_another_model"),
    ),
    "N17": Invariant(
        "Swapped sides turn margins, rewards and slopes; smoothing mixes both ways round.",
        _of(PREFERENCE_LOSS, "n17_the_other_way_round_everything_turns")
        + _of(UNIT_DPO_NUMBERS, "swapping_the_sides_flips_margins_and_accuracies"),
        _of(PREFERENCE_LOSS, "n17_control_smoothing_of_the_other_share"),
    ),
    "N18": Invariant(
        "The slope is -beta * sigmoid(-h) in the chosen side and its negative in the rejected one; gradcheck agrees.",
        _of(DPO_LOSS, "the_closed_form_gradient_of_dpo", "gradcheck"),
        _of(DPO_LOSS, "a_wrong_formula_is_told_apart_by_loss_and_by_gradient"),
    ),
    "N19": Invariant(
        "The loss falls with the margin, is never negative, ln 2 as beta goes to 0, and blind to a constant on both sides.",
        _of(PREFERENCE_LOSS, "n19_a_loss_that_falls_with_the_margin_and_sees_nothing_else")
        + _of(DPO_LOSS, "a_constant_on_both_sides_changes_nothing_but_what_looks_at_lengths"),
        _of(PREFERENCE_LOSS, "n19_control_a_constant_on_one_side_only"),
    ),
    "N20": Invariant(
        "Loss and slope are finite and right up to a margin of 10,000; an empty completion is refused.",
        _of(PREFERENCE_LOSS, "n20_loss_and_slope_are_finite_and_right_however_far_out",
            "n20_an_empty_completion_is_refused_and_never_divided_by")
        + _of(DPO_LOSS, "float32_stays_finite_and_right_far_out"),
        _of(PREFERENCE_LOSS, "n20_control_the_naive_formula"),
    ),
    "N21": Invariant(
        "Both completions behind one prompt in one pass are two plain passes.",
        _of(REFERENCE, "n21_both_completions_in_one_pass_are_two_passes")
        + _of(EXACT_PAIRS, "log_probabilities_and_gradients_are_those_of_one_by_one_passes"),
        _of(REFERENCE, "n21_control_another_prompt_than_ones_own"),
    ),
    "N22": Invariant(
        "Stored reference values are the live ones to the bit, under a name of everything that decides them.",
        _of(REFERENCE, "n22_stored_values_are_the_live_ones_in_every_bit", "n22_what_decides_a_value_is_in_its_name")
        + _of(UNIT_DPO_NUMBERS, "stored_reference_values_are_as_good_as_live_ones"),
        _of(REFERENCE, "n22_stored_values_are_the_live_ones_in_every_bit", "n22_what_decides_a_value_is_in_its_name"),
    ),
    "N23": Invariant(
        "The reference never changes and has no gradient.",
        _of(REFERENCE, "n23_the_reference_stays_and_has_no_gradient")
        + _of(UNIT_DPO, "training_moves_the_policy_and_neither_reference_nor_base"),
        _of(REFERENCE, "n23_control_a_reference_that_is_the_policys_own_tensors"),
    ),
    "N24": Invariant(
        "The rate is a function of the optimizer step, also after a resume, and the last step reaches its end.",
        _of(SCHEDULE_AND_OPTIMIZER, "n24_the_rate_is_a_function_of_the_step_also_after_a_resume")
        + _of(RESUME, "a_longer_run_follows_the_longer_schedule"),
        _of(SCHEDULE_AND_OPTIMIZER, "n24_control_micro_batches_for_steps_and_a_schedule_that_starts_again"),
    ),
    "N25": Invariant(
        "Clipping is by the float64 norm of all gradients together, after unscaling; zero stays zero, and what is not finite "
        "stops the run, or with a loss scaler skips the update.",
        _of(SCHEDULE_AND_OPTIMIZER, "n25_one_norm_over_everything_and_no_more_than_the_limit",
            "n25_gradients_of_zero_stay_zero")
        + _of(UNIT_SFT, "nan_stops_the_run_before_the_update_and_names_step_and_rows")
        + _of(UNIT_LOSS_SCALING, "n25_clipping_is_by_the_norm_after_unscaling",
            "an_infinite_gradient_skips_one_update_and_the_rate_waits"),
        _of(SCHEDULE_AND_OPTIMIZER, "n25_control_each_tensor_clipped_by_its_own_norm")
        + _of(UNIT_LOSS_SCALING, "n25_control_clipping_before_unscaling"),
    ),
    "N26": Invariant(
        "AdamW is the textbook's; every trained tensor is in one group, and vectors do not decay.",
        _of(SCHEDULE_AND_OPTIMIZER, "n26_adamw_is_the_textbooks",
            "n26_everything_that_trains_is_in_one_group_and_vectors_do_not_decay"),
        _of(SCHEDULE_AND_OPTIMIZER, "n26_control_decay_inside_the_moments"),
    ),
    "N27": Invariant(
        "The same seed is the same run byte for byte, whoever builds its batches; another seed is another.",
        _of(ORDER, "n27_the_same_seed_is_the_same_run_whoever_builds_its_batches")
        + _of(BUILT_IN_JOB, "the_same_seed_gives_the_same_run"),
        _of(ORDER, "n27_control_another_seed"),
    ),
    "N28": Invariant(
        "An epoch shows every row once over all ranks, in an order of its own, and adds up to the gradient of all rows.",
        _of(ORDER, "n28_an_epoch_is_every_row_once_and_its_gradient_that_of_all_rows",
            "n28_each_epoch_has_an_order_of_its_own")
        + _of(UNIT_PLAN, "an_epoch_sees_every_sample_once_however_it_is_dealt"),
        _of(ORDER, "n28_control_samples_drawn_with_replacement", "n28_control_two_ranks_that_both_take_everything"),
    ),
    "N29": Invariant(
        "Perplexity is over all tokens, whatever the batch.",
        _of(METRICS_AND_GENERATION, "n29_perplexity_is_that_of_all_tokens_whatever_the_batch")
        + _of(UNIT_PERPLEXITY, "it_equals_one_row_at_a_time_whatever_the_batch"),
        _of(METRICS_AND_GENERATION, "n29_control_a_mean_of_batch_means")
        + _of(UNIT_PERPLEXITY, "a_mean_of_batch_means_would_depend_on_the_batch"),
    ),
    "N30": Invariant(
        "A batch of prompts is answered as each alone; answering leaves modes and random states as they were.",
        _of(METRICS_AND_GENERATION, "n30_a_batch_of_prompts_is_answered_as_each_alone",
            "n30_an_answer_leaves_modes_attention_and_random_states")
        + _of(UNIT_GENERATE, "a_batch_equals_one_by_one_and_a_loop_by_hand"),
        _of(METRICS_AND_GENERATION, "n30_control_padding_that_is_seen", "n30_control_dropout_in_an_answer"),
    ),
    "N31": Invariant(
        "Recorded curves of fifty steps of SFT and of DPO come again.",
        _of(TRAJECTORIES, "n31_ten_steps_are_those_that_were_recorded",
            "n31_fifty_steps_are_those_that_were_recorded"),
        _of(TRAJECTORIES, "n31_control_a_rate_one_percent_off", "n31_control_a_mean_of_means",
            "n31_control_a_beta_one_percent_off"),
    ),
    "N32": Invariant(
        "Eight rows are learned by heart, eight pairs come into their order, and a rate of nought moves no bit.",
        _of(LEARNING, "n32_eight_rows_are_learned_by_heart", "n32_eight_pairs_come_into_their_order",
            "n32_at_a_rate_of_nought_no_bit_moves"),
        _of(LEARNING, "n32_control_rows_that_are_others_in_every_step",
            "n32_control_pairs_whose_sides_change_in_every_step", "n32_at_a_rate_of_nought_no_bit_moves"),
    ),
}
# fmt: on
