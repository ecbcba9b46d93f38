// SPDX-License-Identifier: Apache-2.0

package service

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/prometheus/client_golang/prometheus"

	api "github.com/cohort-project/cohort/api/schedule/v1"
	"github.com/cohort-project/cohort/runtime/schedule"
)

// runner succeeds for one group and fails for the others.
type runner struct{ passed chan string }

func (r runner) Checkpoint(_ context.Context, s schedule.Spec) (schedule.Epoch, error) {
	defer func() { r.passed <- s.Group }()
	if s.Group != "shop" {
		return schedule.Epoch{}, errors.New("no such group")
	}
	return schedule.Epoch{ID: "e", Number: 5, Ref: s.Ref + ".5", StopMS: 12}, nil
}

func (r runner) Prune(context.Context, schedule.Spec) error { return nil }

func (r runner) EndTracking(context.Context, schedule.Spec) error { return nil }

func TestWhatIsSetIsListedAndMeasuredAndRemoved(t *testing.T) {
	r := runner{make(chan string)}
	k, bad, err := schedule.New(filepath.Join(t.TempDir(), "schedules"), r)
	if err != nil || bad != nil {
		t.Fatal(err, bad)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		k.Run(ctx)
	}()
	s := New(k)
	for _, group := range []string{"shop", "other"} {
		set, err := s.Set(ctx, &api.SetRequest{Namespace: "default", Address: "/c.sock", Group: group, Ref: "shop:ck", EveryNs: int64(time.Hour), Keep: 4})
		if err != nil || set.Keep != 4 || set.EveryNs != int64(time.Hour) || set.Ref != "docker.io/library/shop:ck" || set.CreatedUnixNs == 0 {
			t.Fatalf("%v, %v", set, err)
		}
		if got := <-r.passed; got != group {
			t.Errorf("a pass of %s", got)
		}
	}
	var list *api.ListResponse
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if list, err = s.List(ctx, &api.ListRequest{Namespace: "default"}); err != nil {
			t.Fatal(err)
		}
		if l := list.Schedules; len(l) == 2 && l[0].Failed == 1 && l[1].Passes == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v", list)
		}
	}
	if l := list.Schedules[0]; l.Group != "other" || l.Failures != 1 || l.Error != "no such group" || l.ErrorUnixNs == 0 || l.Last != nil {
		t.Errorf("%v", l)
	}
	if l := list.Schedules[1]; l.Last.GetNumber() != 5 || l.Last.GetRef() != "docker.io/library/shop:ck.5" || l.Last.GetStopMs() != 12 || l.NextUnixNs < time.Now().UnixNano() {
		t.Errorf("%v", l)
	}

	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(NewMetrics(k))
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			if c := m.Counter; c != nil {
				got[name] = c.GetValue()
			} else {
				got[name] = m.Gauge.GetValue()
			}
		}
	}
	for name, want := range map[string]float64{
		"cohort_schedule_passes_total shop default done":    1,
		"cohort_schedule_passes_total shop default failed":  0,
		"cohort_schedule_passes_total other default failed": 1,
		"cohort_schedule_failures other default":            1,
		"cohort_schedule_last_stop_seconds shop default":    0.012,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v; all: %v", name, v, want, got)
		}
	}

	if _, err := s.Remove(ctx, &api.RemoveRequest{Namespace: "default", Group: "shop"}); err != nil {
		t.Error(err)
	}
	_, err = s.Remove(ctx, &api.RemoveRequest{Namespace: "default", Group: "shop"})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"shop"`) {
		t.Errorf("%v", err)
	}
	_, err = s.Set(ctx, &api.SetRequest{Namespace: "default", Address: "/c.sock", Group: "shop", Ref: "shop:ck", EveryNs: 1, Keep: 4})
	if !errdefs.IsInvalidArgument(errgrpc.ToNative(err)) {
		t.Errorf("%v", err)
	}
	cancel()
	<-ended
	_, err = s.Set(t.Context(), &api.SetRequest{Namespace: "default", Address: "/c.sock", Group: "shop", Ref: "shop:ck", EveryNs: int64(time.Hour), Keep: 4})
	if !errdefs.IsUnavailable(errgrpc.ToNative(err)) {
		t.Errorf("after the end: %v", err)
	}
}
