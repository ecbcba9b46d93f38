// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	scheduleAPI "github.com/cohort-project/cohort/api/schedule/v1"
	storage "github.com/cohort-project/cohort/api/storage/v1"
	"github.com/cohort-project/cohort/runtime/journal"
	"github.com/cohort-project/cohort/runtime/schedule"
	scheduleservice "github.com/cohort-project/cohort/runtime/schedule/service"
	"github.com/cohort-project/cohort/runtime/undo"
	"github.com/cohort-project/cohort/snapshotter"
	"github.com/cohort-project/cohort/snapshotter/capture"
	"github.com/cohort-project/cohort/snapshotter/service"
	"github.com/cohort-project/cohort/snapshotter/volume"
)

// stopTimeout is how long calls under way may take after a signal to stop.
const stopTimeout = 10 * time.Second

// task runs in the background until its context ends.
type task struct {
	name string
	run  func(ctx context.Context)
}

// serve runs the daemon until a signal or the end of ctx.
func serve(ctx context.Context, o options) (err error) {
	ctx, cancel := signal.NotifyContext(ctx, unix.SIGINT, unix.SIGTERM)
	defer cancel()

	root, err := volume.Resolve(o.root)
	if err != nil {
		return err
	}
	unlock, err := lockRoot(root)
	if err != nil {
		return err
	}
	defer unlock()
	vol, err := volume.Setup(ctx, root, o.backend)
	if err != nil {
		return fmt.Errorf("ready the root %s: %w", root, err)
	}
	captures, err := capture.NewStore(ctx, root, vol.Backend)
	if err != nil {
		return fmt.Errorf("open the captures: %w", err)
	}
	defer func() { err = errors.Join(err, captures.Close()) }()
	sn, err := snapshotter.New(ctx, root, captures)
	if err != nil {
		return fmt.Errorf("open the snapshots: %w", err)
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	metrics := service.NewMetrics(root, captures, sn)
	keeper, err := openSchedules(ctx, root)
	if err != nil {
		return err
	}

	address := o.snapshotterAddress(root)
	servers, err := start(ctx, o, root, address, sn, captures, metrics, keeper)
	if err != nil {
		return err
	}
	endPasses := runSchedules(ctx, keeper)
	var background sync.WaitGroup
	for _, t := range []task{
		{"watch the storage", vol.Watch},
		{"undo epochs of dead shims", func(ctx context.Context) { undo.Janitor(ctx, journal.Dir()) }},
		{"discard captures that were never exported", captures.Janitor},
	} {
		background.Go(func() {
			log.G(ctx).Debugf("task: %s", t.name)
			t.run(ctx)
		})
	}
	log.G(ctx).WithField("backend", vol.Backend.Name()).WithField("address", address).Infof("cohortd serves %s", root)
	notify(ctx, daemon.SdNotifyReady)

	select {
	case <-ctx.Done():
		log.L.Info("stopping; containers and mounts stay")
	case err = <-servers.failed:
	}
	cancel()
	notify(ctx, daemon.SdNotifyStopping)
	// First: members that undo a pass discard their captures here.
	endPasses()
	servers.stop()
	background.Wait()
	return err
}

// servers are what listens.
type servers struct {
	failed chan error // the first failure
	stops  []func(ctx context.Context)
}

// start listens on all addresses. On an error nothing listens.
func start(ctx context.Context, o options, root, address string, sn *snapshotter.Snapshotter, captures *capture.Store, metrics *service.Metrics, keeper *schedule.Keeper) (_ *servers, err error) {
	s := &servers{failed: make(chan error, 3)}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()

	gl, err := listen(ctx, address)
	if err != nil {
		return nil, err
	}
	g := grpc.NewServer(grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize))
	snapshotsapi.RegisterSnapshotsServer(g, snapshotservice.FromSnapshotter(sn))
	s.run("snapshots service", func() error { return g.Serve(gl) }, func(ctx context.Context) {
		defer context.AfterFunc(ctx, g.Stop)()
		g.GracefulStop()
	})

	tl, err := listen(ctx, filepath.Join(root, "host.sock"))
	if err != nil {
		return nil, err
	}
	t, err := ttrpc.NewServer(ttrpc.WithServerHandshaker(ttrpc.UnixSocketRequireSameUser()))
	if err != nil {
		return nil, err
	}
	storage.RegisterStorageService(t, service.NewStorage(root, address, captures, sn, metrics))
	scheduleAPI.RegisterSchedulesService(t, scheduleservice.New(keeper))
	s.run("storage and schedule services", func() error { return t.Serve(context.WithoutCancel(ctx), tl) }, func(ctx context.Context) {
		if err := t.Shutdown(ctx); err != nil {
			t.Close()
		}
	})

	if o.metrics == "off" || o.metrics == "" {
		return s, nil
	}
	hl, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.metrics)
	if err != nil {
		return nil, fmt.Errorf("listen for Prometheus: %w", err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(metrics, scheduleservice.NewMetrics(keeper), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	h := &http.Server{Handler: mux, ReadHeaderTimeout: stopTimeout}
	s.run("metrics", func() error { return h.Serve(hl) }, func(ctx context.Context) {
		if err := h.Shutdown(ctx); err != nil {
			h.Close()
		}
	})
	return s, nil
}

// run serves in the background; stop makes serve return.
func (s *servers) run(name string, serve func() error, stop func(ctx context.Context)) {
	s.stops = append(s.stops, stop)
	go func() {
		err := serve()
		if err != nil && !errors.Is(err, ttrpc.ErrServerClosed) && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, grpc.ErrServerStopped) {
			s.failed <- fmt.Errorf("%s: %w", name, err)
		}
	}()
}

// stop ends all servers, after the calls under way, or at stopTimeout without them.
func (s *servers) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	var all sync.WaitGroup
	for _, stop := range s.stops {
		all.Go(func() { stop(ctx) })
	}
	all.Wait()
}

// notify tells the service manager, if there is one.
func notify(ctx context.Context, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.G(ctx).WithError(err).Warn("telling the service manager")
	}
}
