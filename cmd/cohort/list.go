// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/ops"
)

func psCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "ps",
		Short:   "List groups, their members and their last checkpoint",
		Example: "  cohort ps\n  cohort ps --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.host(cmd, func(ctx context.Context, h *ops.Host) error {
				list, err := h.Ps(ctx)
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, list)
				}
				rows := [][]string{{"GROUP", "MEMBER", "ID", "STATE", "PROCESSES", "MEMORY", "LAST CHECKPOINT"}}
				for _, s := range list {
					last := "-"
					if s.Checkpoint != "" {
						last = fmt.Sprintf("%s (%s ago)", s.Checkpoint, time.Since(s.CheckpointTime).Round(time.Second))
					}
					group := s.Group
					if group == "" {
						group = "-"
					}
					rows = append(rows, []string{group, s.Member, s.ID, s.State, fmt.Sprint(s.Processes), size(s.MemoryBytes), last})
				}
				return table(o.out, rows)
			})
		},
	}
}

func imagesCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "images",
		Short: "List checkpoint images of groups",
		Long: `Images lists the checkpoints in containerd's image store. CHAIN is "full", or how
many epochs the checkpoint consists of and the full one that they begin with;
INCREMENT is what is of this epoch alone, SIZE the whole.`,
		Example: "  cohort images",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return o.host(cmd, func(ctx context.Context, h *ops.Host) error {
				list, err := h.Images(ctx)
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, list)
				}
				rows := [][]string{{"REF", "GROUP", "EPOCH", "PARENT", "CHAIN", "MEMBERS", "CUT", "INCREMENT", "SIZE"}}
				for _, l := range list {
					g := l.Group
					rows = append(rows, []string{
						l.Ref, g.Name, fmt.Sprintf("#%d", g.EpochNumber), parent(g.Parent), chain(g), fmt.Sprint(len(g.Members)),
						g.CutAt.Local().Format(time.DateTime), size(uint64(l.IncrementBytes)), size(uint64(l.Bytes)),
					})
				}
				return table(o.out, rows)
			})
		},
	}
}

// chain says what a checkpoint consists of: "full", or "3 from #5" for the third
// epoch of a chain that began with epoch 5.
func chain(g *oci.Group) string {
	switch {
	case g.Chain <= 1:
		return "full"
	case g.FullEpoch == 0:
		return fmt.Sprint(g.Chain)
	}
	return fmt.Sprintf("%d from #%d", g.Chain, g.FullEpoch)
}

func parent(p *oci.ParentEpoch) string {
	if p == nil {
		return "-"
	}
	return fmt.Sprintf("#%d", p.Number)
}

func inspectCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "inspect REF",
		Short:   "Show what a checkpoint image holds",
		Example: "  cohort inspect registry.example/shop:1\n  cohort inspect --json registry.example/shop:1-db",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return o.host(cmd, func(ctx context.Context, h *ops.Host) error {
				g, err := h.Inspect(ctx, args[0])
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, g)
				}
				printTree(o.out, g)
				return nil
			})
		},
	}
}

func printTree(w io.Writer, g *oci.Group) {
	fmt.Fprintf(w, "group %s, epoch %d (%s), cut at %s\n", g.Name, g.EpochNumber, g.Epoch, g.CutAt.Local().Format(time.RFC3339Nano))
	if g.Parent != nil {
		fmt.Fprintf(w, "increment on epoch %d (%s), a chain of %s\n", g.Parent.Number, g.Parent.Epoch, chain(g))
	}
	for i, m := range g.Members {
		mark, bar := "├── ", "│   "
		if i == len(g.Members)-1 {
			mark, bar = "└── ", "    "
		}
		fmt.Fprintf(w, "%s%s\n", mark, m.Name)
		if ck := m.Checkpoint; ck != nil {
			fmt.Fprintf(w, "%scontainer  %s\n%simage      %s\n", bar, ck.ContainerID, bar, ck.Rootfs.ImageRef)
			fmt.Fprintf(w, "%smemory     %s, storage %s\n", bar, size(ck.MemoryBytes), size(ck.StorageBytes))
			fmt.Fprintf(w, "%shost       kernel %s, %s, CRIU %s\n%sprocesses  %d\n", bar, ck.Host.Kernel, ck.Host.Arch, ck.CRIUVersion, bar, len(ck.Processes))
			printProcesses(w, bar, ck.Processes)
		}
		fmt.Fprintf(w, "%slayers     %s, of this epoch %s\n", bar, size(uint64(max(m.Bytes, 0))), size(uint64(max(m.IncrementBytes, 0))))
		for _, l := range m.Layers {
			of := "-"
			if l.EpochNumber > 0 {
				of = fmt.Sprintf("#%d", l.EpochNumber)
			}
			fmt.Fprintf(w, "%s  %-10s %5s %10s  %s\n", bar, l.Kind, of, size(uint64(max(l.Descriptor.Size, 0))), l.Descriptor.Digest)
		}
	}
}

// printProcesses shows who descends from whom. The list came out of an image:
// one that has no root or goes in circles is cut off, not followed.
func printProcesses(w io.Writer, bar string, list []oci.Process) {
	children := map[int32][]oci.Process{}
	known := map[int32]bool{}
	for _, p := range list {
		known[p.PID] = true
	}
	for _, p := range list {
		parent := p.PPID
		if !known[parent] || parent == p.PID {
			parent = 0
		}
		children[parent] = append(children[parent], p)
	}
	seen := map[int32]bool{}
	var show func(parent int32, indent string)
	show = func(parent int32, indent string) {
		for _, p := range children[parent] {
			if seen[p.PID] {
				continue
			}
			seen[p.PID] = true
			fmt.Fprintf(w, "%s  %s%d %s (%d threads, %s)\n", bar, indent, p.PID, p.Comm, p.Threads, size(p.RSS))
			show(p.PID, indent+"  ")
		}
	}
	show(0, "")
}
