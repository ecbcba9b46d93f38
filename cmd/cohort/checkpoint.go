// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/ops"
	"github.com/cohort-project/cohort/runtime/pace"
)

func checkpointCommand(o *options) *cobra.Command {
	var opts ops.CheckpointOptions
	var memory string
	var percent float64
	cmd := &cobra.Command{
		Use:   "checkpoint [flags] [GROUP] REF",
		Short: "Checkpoint a group of containers into images",
		Long: `Checkpoint takes all members of a group through one barrier and stores what it
captured as OCI images: REF names the group, REF-MEMBER each member. The members
go on running, unless --stop is given.

Where an earlier checkpoint of a member is still here, only what changed since is
stored: its image is that one's and two layers more. A chain of more than
--max-chain epochs is made a full checkpoint at once, while the members run.`,
		Example: `  cohort checkpoint shop registry.example/shop:1
  cohort checkpoint --keep-tracking shop registry.example/shop:2
  cohort checkpoint --stop --timeout 30s shop registry.example/shop:final
  cohort checkpoint --member db --member cache registry.example/pair:1`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(opts.Members) > 0 && len(args) != 1:
				return fmt.Errorf("with --member give REF alone, not %d arguments", len(args))
			case len(opts.Members) == 0 && len(args) != 2:
				return fmt.Errorf("GROUP and REF are needed, got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if opts.Timeout <= 0 {
				return usage("--timeout %s: give a positive duration", opts.Timeout)
			}
			switch memory {
			case "auto":
				opts.Engine = ""
			case "wp-async", "soft-dirty", "full":
				opts.Engine = memory
			default:
				return usage("--memory %q: use auto, wp-async, soft-dirty or full", memory)
			}
			if opts.Full && opts.Parent != "" {
				return usage("--full and --parent: give one or the other")
			}
			if opts.MaxChain < 1 {
				return usage("--max-chain %d: give at least 1", opts.MaxChain)
			}
			if !(percent >= 0 && percent <= 100) {
				return usage("--pace %v: give a percentage from 0 to 100", percent)
			}
			opts.Ref = args[len(args)-1]
			if len(args) == 2 {
				opts.Group = args[0]
			}
			if opts.Pace = percent / 100; percent == 0 {
				opts.Pace = -1
			}
			return o.host(cmd, func(ctx context.Context, h *ops.Host) error {
				p := newProgress(o.err)
				opts.Progress = func(what string) {
					if what == group.PhaseExport {
						yield() // nobody waits for this process any more
					}
					p.Step(what)
				}
				res, err := h.Checkpoint(ctx, opts)
				p.Close()
				if res != nil && !o.json {
					printFindings(o.err, res.Preflight)
				}
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, res)
				}
				fmt.Fprintf(o.out, "%s: %d members, epoch %d, stopped for %.1f ms (skew %.1f ms)\n", res.Ref, len(res.Members), res.Number, res.StopMS, res.SkewMS)
				rows := [][]string{{"MEMBER", "PROCESSES", "MEMORY", "STORAGE", "STOP", "STORED", "IMAGE"}}
				for _, m := range res.Members {
					stored := size(uint64(m.IncrementBytes)) + " (full)"
					if m.ParentEpoch != "" {
						stored = size(uint64(m.IncrementBytes)) + " (increment)"
					}
					rows = append(rows, []string{m.Name, fmt.Sprint(m.Processes), size(m.MemoryBytes), size(m.StorageBytes), fmt.Sprintf("%.1f ms", m.StopMS), stored, m.Image})
				}
				if res.Merge != nil {
					printMerge(o.out, res.Merge)
				}
				if res.MergeError != "" {
					fmt.Fprintf(o.err, "warn: the checkpoint is there, but its chain is longer than %d epochs and was not merged: %s\n", opts.MaxChain, res.MergeError)
				}
				return table(o.out, rows)
			})
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&opts.Members, "member", nil, "container to checkpoint, instead of a group; may be repeated")
	f.BoolVar(&opts.Stop, "stop", false, "end the members in the barrier: only the images remain")
	f.BoolVar(&opts.Full, "full", false, "store everything, also what an earlier checkpoint holds")
	f.StringVar(&opts.Parent, "parent", "", "store what changed since this checkpoint `REF` of the group (default: the newest)")
	f.BoolVar(&opts.KeepTracking, "keep-tracking", false, "go on tracking writes, so that the next checkpoint need not compare what did not change")
	f.StringVar(&memory, "memory", "auto", "how memory is taken: auto, wp-async, soft-dirty or full")
	f.IntVar(&opts.MaxChain, "max-chain", ops.DefaultMaxChain, "epochs that a checkpoint may consist of before it is merged")
	f.Float64Var(&percent, "pace", 100*pace.Share, "`PERCENT` of the processors to use of a busy host while the members run; 0 for no limit")
	f.DurationVar(&opts.Timeout, "timeout", 60*time.Second, "longest time that the members may stand still")
	return cmd
}

func checkCommand(o *options) *cobra.Command {
	var ids []string
	cmd := &cobra.Command{
		Use:   "check [flags] [GROUP]",
		Short: "Tell whether a group could be checkpointed now",
		Long: `Check runs the preflight of a checkpoint alone: it finds what would make one fail
and names the member, the process and the cure; and it tells for each member how its
memory would be taken on this host, and why. Nothing is changed. The exit code is 3
if a checkpoint would be refused.`,
		Example: `  cohort check shop
  cohort check --member db`,
		Args: func(_ *cobra.Command, args []string) error {
			if (len(ids) > 0) == (len(args) == 1) || len(args) > 1 {
				return fmt.Errorf("give one GROUP, or --member")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			group := ""
			if len(args) == 1 {
				group = args[0]
			}
			return o.host(cmd, func(ctx context.Context, h *ops.Host) error {
				report, err := h.Check(ctx, group, ids)
				if report != nil {
					if o.json {
						if perr := printJSON(o.out, report); perr != nil {
							return perr
						}
					} else {
						printFindings(o.out, report.Report)
						rows := [][]string{{"MEMBER", "ENGINE", "BECAUSE"}}
						for _, m := range report.Memory {
							rows = append(rows, []string{m.Member, cmp.Or(m.Engine, "-"), m.Why})
						}
						if len(rows) > 1 {
							if err := table(o.out, rows); err != nil {
								return err
							}
						}
						if err == nil {
							fmt.Fprintf(o.out, "%d members can be checkpointed\n", len(report.Members))
						}
					}
				}
				return err
			})
		},
	}
	cmd.Flags().StringArrayVar(&ids, "member", nil, "container to check, instead of a group; may be repeated")
	return cmd
}
