// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cohort-project/cohort/runtime/ops"
)

func pruneCommand(o *options) *cobra.Command {
	var opts ops.PruneOptions
	cmd := &cobra.Command{
		Use:   "prune --keep N [flags] [GROUP]",
		Short: "Remove the older checkpoints of a group",
		Long: `Prune removes the names of all but the N newest epochs of a group, or of every
group. The layers that a remaining epoch builds on stay; containerd's garbage
collector frees the rest. An epoch from which a container was restored stays as
long as the container.`,
		Example: `  cohort prune --keep 10 shop
  cohort prune --keep 3 --dry-run`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if opts.Keep < 1 {
				return usage("--keep %d: give how many epochs are to stay, at least 1", opts.Keep)
			}
			if len(args) == 1 {
				opts.Group = args[0]
			}
			return o.host(cmd, func(ctx context.Context, h *ops.Host) error {
				res, err := h.Prune(ctx, opts)
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, res)
				}
				return printPruned(o.out, res)
			})
		},
	}
	f := cmd.Flags()
	f.IntVar(&opts.Keep, "keep", 0, "how many of a group's newest epochs stay")
	f.BoolVar(&opts.DryRun, "dry-run", false, "tell what would be removed, and remove nothing")
	return cmd
}

func printPruned(w io.Writer, res *ops.PruneResult) error {
	done, n := "removed", 0
	if res.DryRun {
		done = "would remove"
	}
	rows := [][]string{{"", "GROUP", "EPOCH", "CUT", "NAMES"}}
	row := func(what, group string, e ops.PruneEpoch) {
		rows = append(rows, []string{what, group, fmt.Sprintf("#%d", e.Number), e.CutAt.Local().Format(time.DateTime), strings.Join(e.Names, " ")})
	}
	for _, g := range res.Groups {
		for _, e := range g.Kept {
			if len(e.UsedBy) > 0 {
				row("in use by "+strings.Join(e.UsedBy, " "), g.Group, e)
			}
		}
		for _, e := range g.Removed {
			row(done, g.Group, e)
			n++
		}
	}
	if len(rows) > 1 {
		if err := table(w, rows); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "%s %d epochs\n", done, n)
	return nil
}

func mergeCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "merge REF",
		Short: "Make a full checkpoint of one that builds on others",
		Long: `Merge builds the images of a checkpoint that consists of several epochs anew, as
those of a full one, and then moves REF and REF-MEMBER to them. The group may run
meanwhile; other epochs are not touched. A checkpoint that is full is left alone.`,
		Example: "  cohort merge registry.example/shop:9",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.host(cmd, func(ctx context.Context, h *ops.Host) error {
				p := newProgress(o.err)
				res, err := h.Merge(ctx, ops.MergeOptions{Ref: args[0], Progress: p.Step})
				p.Close()
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, res)
				}
				printMerge(o.out, res)
				return nil
			})
		},
	}
}

func printMerge(w io.Writer, res *ops.MergeResult) {
	var before, after int64
	epochs := 1
	for _, m := range res.Members {
		before, after, epochs = before+m.BytesBefore, after+m.Bytes, max(epochs, m.Chain)
	}
	if epochs == 1 {
		fmt.Fprintf(w, "%s is a full checkpoint already\n", res.Ref)
		return
	}
	fmt.Fprintf(w, "%s: %d epochs (%s) merged into a full checkpoint (%s) in %.0f ms\n", res.Ref, epochs, size(uint64(before)), size(uint64(after)), res.TotalMS)
}
