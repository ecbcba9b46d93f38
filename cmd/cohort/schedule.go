// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"github.com/spf13/cobra"

	api "github.com/cohort-project/cohort/api/schedule/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/oci/names"
	"github.com/cohort-project/cohort/runtime/schedule"
)

// Socket of cohortd below its root, and the root where none is named.
const (
	daemonRoot   = "/var/lib/cohort"
	daemonSocket = "host.sock"
)

// daemonTimeout bounds a call of cohortd. Removing a schedule waits for the members of
// a pass to be let go.
const daemonTimeout = time.Minute

// scheduleDocument is what --json prints for a schedule; docs/cli.md has the schema.
type scheduleDocument struct {
	Namespace string         `json:"namespace"`
	Group     string         `json:"group"`
	Ref       string         `json:"ref"`
	EverySec  float64        `json:"every_seconds"`
	Keep      uint32         `json:"keep"`
	Address   string         `json:"address"`
	Created   time.Time      `json:"created"`
	Running   bool           `json:"running"`
	Next      time.Time      `json:"next,omitzero"`
	Last      *epochDocument `json:"last,omitempty"`
	Passes    uint64         `json:"passes"`
	Failed    uint64         `json:"failed"`
	Failures  uint32         `json:"failures"`
	Error     string         `json:"error,omitempty"`
	ErrorAt   time.Time      `json:"error_at,omitzero"`
}

type epochDocument struct {
	Epoch  string    `json:"epoch"`
	Number uint64    `json:"epoch_number"`
	Ref    string    `json:"ref"`
	At     time.Time `json:"at"`
	StopMS float64   `json:"stop_ms"`
}

func scheduleCommand(o *options) *cobra.Command {
	var (
		list, remove bool
		every        time.Duration
		keep         int
		socket       string
	)
	cmd := &cobra.Command{
		Use:   "schedule [flags] GROUP REF | --list | --remove GROUP",
		Short: "Checkpoint a group again and again",
		Long: `Schedule has cohortd checkpoint a group at an interval, from now on until the schedule
is removed; it survives restarts of cohortd, of containerd and of the host. Epoch N is
named REF.N, and REF is the newest. Of the schedule's epochs the newest --keep stay;
checkpoints of other names are not touched. A group has one schedule: setting it again
replaces it.

What a pass cannot do (the group is gone, containerd is down, somebody else checkpoints
the group) is tried again, at longer and longer intervals up to five minutes; --list
shows how each schedule goes.`,
		Example: `  cohort schedule shop registry.example/shop:ck --every 30s --keep 10
  cohort schedule --list
  cohort restore registry.example/shop:ck
  cohort schedule --remove shop`,
		Args: func(cmd *cobra.Command, args []string) error {
			set := cmd.Flags().Changed("every") || cmd.Flags().Changed("keep")
			switch {
			case list && remove:
				return errors.New("--list or --remove, not both")
			case (list || remove) && set:
				return errors.New("--every and --keep are for setting a schedule, not for --list and --remove")
			case list && len(args) != 0:
				return fmt.Errorf("--list takes no argument, got %d", len(args))
			case remove && len(args) != 1:
				return fmt.Errorf("with --remove give GROUP alone, not %d arguments", len(args))
			case !list && !remove && len(args) != 2:
				return fmt.Errorf("GROUP and REF are needed, got %d arguments", len(args))
			case !list && !remove && every < schedule.MinEvery:
				return fmt.Errorf("--every %s: give an interval of %s or more", every, schedule.MinEvery)
			case !list && !remove && keep < 1:
				return fmt.Errorf("--keep %d: keep one epoch at least", keep)
			case !list && !remove:
				_, err := names.NormalizeRef(args[1])
				return errors.Join(oci.ValidGroup(args[0]), err)
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), daemonTimeout)
			defer cancel()
			client, closeClient, err := dialSchedules(ctx, socket)
			if err != nil {
				return err
			}
			defer closeClient()
			switch {
			case list:
				return o.listSchedules(ctx, client)
			case remove:
				_, err := client.Remove(ctx, &api.RemoveRequest{Namespace: o.namespace, Group: args[0]})
				return errgrpc.ToNative(err)
			}
			return o.setSchedule(ctx, client, args[0], args[1], every, keep)
		},
	}
	f := cmd.Flags()
	f.DurationVar(&every, "every", 0, "time from the beginning of one checkpoint to that of the next; 1s or more")
	f.IntVar(&keep, "keep", 10, "how many epochs to keep")
	f.BoolVar(&list, "list", false, "show the schedules of the namespace and how they go")
	f.BoolVar(&remove, "remove", false, "remove the schedule of GROUP; its epochs stay")
	f.StringVar(&socket, "daemon", filepath.Join(env("COHORT_ROOT", daemonRoot), daemonSocket), "cohortd's socket [COHORT_ROOT/"+daemonSocket+"]")
	return cmd
}

// dialSchedules connects to cohortd.
func dialSchedules(ctx context.Context, socket string) (api.SchedulesService, func(), error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", strings.TrimPrefix(socket, "unix://"))
	if err != nil {
		return nil, nil, fmt.Errorf("connect to cohortd at %s: %w; is it running, and is --daemon (COHORT_ROOT) right?", socket, err)
	}
	c := ttrpc.NewClient(conn)
	return api.NewSchedulesClient(c), func() { c.Close() }, nil
}

func (o *options) setSchedule(ctx context.Context, client api.SchedulesService, group, ref string, every time.Duration, keep int) error {
	// cohortd has another working directory.
	address := strings.TrimPrefix(o.address, "unix://")
	address, err := filepath.Abs(address)
	if err != nil {
		return err
	}
	s, err := client.Set(ctx, &api.SetRequest{
		Namespace: o.namespace, Address: address, Group: group, Ref: ref, EveryNs: int64(every), Keep: uint32(min(keep, 1<<31-1)),
	})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	if o.json {
		return printJSON(o.out, document(s))
	}
	fmt.Fprintf(o.out, "%s: every %s as %s, the newest %d are kept ('cohort schedule --list' shows how it goes)\n", s.Group, every, s.Ref, s.Keep)
	return nil
}

func (o *options) listSchedules(ctx context.Context, client api.SchedulesService) error {
	resp, err := client.List(ctx, &api.ListRequest{Namespace: o.namespace})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	docs := []scheduleDocument{}
	for _, s := range resp.Schedules {
		docs = append(docs, document(s))
	}
	if o.json {
		return printJSON(o.out, docs)
	}
	rows := [][]string{{"GROUP", "REF", "EVERY", "KEEP", "EPOCH", "STOP", "NEXT", "STATE"}}
	for _, d := range docs {
		epoch, stop := "-", "-"
		if d.Last != nil {
			epoch = fmt.Sprintf("%d (%s ago)", d.Last.Number, time.Since(d.Last.At).Round(time.Second))
			stop = fmt.Sprintf("%.1f ms", d.Last.StopMS)
		}
		next, state := "now", "running"
		if !d.Running {
			next, state = "in "+max(0, time.Until(d.Next)).Round(time.Second).String(), "waiting"
		}
		if d.Failures > 0 {
			first, _, _ := strings.Cut(d.Error, "\n")
			state = fmt.Sprintf("%s, failed %d times, %s ago: %s", state, d.Failures, time.Since(d.ErrorAt).Round(time.Second), first)
		}
		every := time.Duration(d.EverySec * float64(time.Second)).String()
		rows = append(rows, []string{d.Group, d.Ref, every, fmt.Sprint(d.Keep), epoch, stop, next, state})
	}
	return table(o.out, rows)
}

func document(s *api.Schedule) scheduleDocument {
	d := scheduleDocument{
		Namespace: s.Namespace, Group: s.Group, Ref: s.Ref, EverySec: time.Duration(s.EveryNs).Seconds(), Keep: s.Keep, Address: s.Address,
		Created: stamp(s.CreatedUnixNs), Running: s.Running, Next: stamp(s.NextUnixNs),
		Passes: s.Passes, Failed: s.Failed, Failures: s.Failures, Error: s.Error, ErrorAt: stamp(s.ErrorUnixNs),
	}
	if l := s.Last; l != nil {
		d.Last = &epochDocument{Epoch: l.Id, Number: l.Number, Ref: l.Ref, At: stamp(l.AtUnixNs), StopMS: l.StopMs}
	}
	return d
}

func stamp(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}
